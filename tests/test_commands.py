"Commands: from the lab's models to a recovered, evaluated checkpoint, and one clear line for everything that can be wrong."
import configparser, importlib, json, sys, pytest
from act.checkpoints import load_model, weight_hash
from act.core import quiet
from act.masks import ChannelMask, ChannelScores
from conftest import tiny_model

SETTINGS = configparser.ConfigParser(delimiters=['='])
SETTINGS.read('settings.ini')
SCRIPTS = dict(l.split('=') for l in SETTINGS['DEFAULT']['console_scripts'].split('\n'))

@pytest.fixture
def run(monkeypatch, capsys):
    "Run a command as from a shell: (exit code, stdout, stderr)."
    def _run(line):
        name, *args = line.split()
        module, f = SCRIPTS[name].split(':')
        monkeypatch.setattr(sys, 'argv', [name, *args])
        code = getattr(importlib.import_module(module), f)()
        return (code or 0, *capsys.readouterr())
    return _run

@pytest.mark.parametrize('name', list(SCRIPTS))
def test_help(name, run, capsys):
    with pytest.raises(SystemExit) as e: run(f'{name} --help')
    text = capsys.readouterr().out
    assert e.value.code == 0 and f': {name} ' in text and 'None' not in text.replace('(default: None)', '')

def test_the_pipeline(run, tmp_path):
    t = tmp_path
    (t/'mine.jsonl').write_text('\n'.join(json.dumps(dict(prompt=f'2+{i}', answer=f'={2+i}')) for i in range(8)))
    assert run(f'act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --n 40 --out {t}/s.safetensors')[0] == 0
    assert run(f'act_mask --scores {t}/s.safetensors --p 0.1 --rank module --out {t}/m.safetensors')[0] == 0
    assert run(f'act_mask --scores {t}/s.safetensors --p 0.1 --control random --seed 3 --out {t}/r.safetensors')[0] == 0
    assert run(f'act_mask --scores {t}/s.safetensors --p 0.1 --rank module --whole embedding --out {t}/w.safetensors')[0] == 0
    m, r = (ChannelMask.load(t/f'{n}.safetensors') for n in 'mr')
    assert m.count == r.count == round(.1*m.total) and m != r and ChannelMask.load(t/'w.safetensors')['model.embed_tokens'].all() and ChannelScores.load(t/'s.safetensors').meta['items'] == 40
    code, out, _ = run(f'act_transfer --target lab/maths-en --donor lab/base --mask {t}/m.safetensors --lam 0.5 --out {t}/moved')
    assert code == 0 and f'{m.count:,} of {m.total:,} channels from lab/base, lam 0.5' in out
    assert run(f'act_finetune --model {t}/moved --ability lab/science-zh,{t}/mine.jsonl --mask {t}/m.safetensors --steps 2 --batch_size 4 --out {t}/tuned')[0] == 0
    code, out, _ = run(f'act_evaluate --model {t}/tuned --ability lab/science-zh,{t}/mine.jsonl --n 8 --out {t}/e.json')
    assert code == 0 and 'science-zh' in out and 'mine' in out
    e = json.loads((t/'e.json').read_text())
    assert e['meta']['weights'] == weight_hash(t/'tuned') and e['meta']['provenance' if 'provenance' in e['meta'] else 'git'] and len(e['items']['id']) == 16
    a, b = load_model(t/'moved')[0], load_model(t/'tuned')[0]
    assert a.dtype == b.dtype and weight_hash(a) != weight_hash(b)

def test_the_score_matrix_as_json(run):
    code, out, _ = run('act_lab --json')
    d = json.loads(out)
    assert code == 0 and d['base']['science-zh'] >= .9 and len(d) == 5 and len(d['maths-en']) == 24
    assert 'maths-en' in run('act_lab --models maths-en')[1]

def test_several_donors_by_commas(run, tmp_path):
    t = tmp_path
    for n, d in (('a', 'lab/science-zh'), ('b', 'lab/science-es')):
        assert run(f'act_localize --target lab/base --donor {d} --ability lab/chemistry-zh --n 16 --out {t}/{n}.s')[0] == 0
        assert run(f'act_mask --scores {t}/{n}.s --p 0.05 --out {t}/{n}.m')[0] == 0
    assert run(f'act_transfer --target lab/base --donor lab/science-zh,lab/science-es --mask {t}/a.m,{t}/b.m --lam 0.5,0.25 --out {t}/merged')[0] == 0
    assert [m['lam'] for m in json.loads((t/'merged'/'act_transfer.json').read_text())['moved']] == [.5, .25]

@pytest.fixture
def files(run, tmp_path):
    run(f'act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --n 8 --out {tmp_path}/s')
    run(f'act_mask --scores {tmp_path}/s --p 0.1 --out {tmp_path}/m')
    return tmp_path

@pytest.mark.parametrize('line, words', [
    ('act_mask --scores {t}/s --p 0 --out {t}/x', 'fraction of all channels'), ('act_mask --scores {t}/s --p 1.5 --out {t}/x', 'fraction of all channels'),
    ('act_mask --scores {t}/s --rank best --out {t}/x', "choose 'raw' or 'module'"), ('act_mask --scores {t}/m --out {t}/x', 'format'), ('act_mask --scores {t}/none --out {t}/x', 'no score file'), ('act_mask', 'needs --scores'),
    ('act_transfer --target lab/maths-en --donor lab/base --mask {t}/m --lam nan --out {t}/x', 'lam is nan'), ('act_transfer --target lab/maths-en --donor lab/base --mask {t}/m --lam much --out {t}/x', "lam is 'much'"),
    ('act_transfer --target lab/swahili --donor lab/base --mask {t}/m --out {t}/x', 'another target'), ('act_transfer --target lab/maths-en --donor lab/swahili --mask {t}/m --out {t}/x', 'another donor'),
    ('act_transfer --target lab/maths-en --donor {t}/tiny --mask {t}/m --out {t}/x', 'differ in'), ('act_transfer --target lab/maths-en --donor lab/base --mask {t}/s --out {t}/x', 'not a usable mask'),
    ('act_transfer --target lab/maths-en --donor lab/base --mask {t}/m --out {t}/full', 'exists already'), ('act_transfer --target lab/maths-en', 'needs --target'),
    ('act_localize --target lab/maths-en --donor {t}/tiny --ability lab/science-zh --out {t}/x', 'differ in'), ('act_localize --target lab/maths-en --donor lab/base --ability lab/science-xx --out {t}/x', 'no lab ability'),
    ('act_localize --target lab/maths-en --donor lab/base --ability {t}/bad.jsonl --out {t}/x', 'bad.jsonl, line 2'), ('act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --max_length 3 --out {t}/x', 'no answer tokens left'),
    ('act_localize --target lab/nobody --donor lab/base --ability lab/science-zh --out {t}/x', 'no lab model'), ('act_localize --target {t}/cut --donor lab/base --ability lab/science-zh --out {t}/x', 'truncated'),
    ('act_finetune --model lab/base --ability lab/science-zh --steps 0 --out {t}/x', 'above zero'), ('act_finetune --model lab/base --ability lab/science-zh --out {t}/full', 'exists already'),
    ('act_evaluate --model lab/base --ability {t}/empty.jsonl --out {t}/x', 'holds no items'), ('act_evaluate --model {t}/cut --ability lab/science-zh', 'truncated'), ('act_lab --train', 'needs --out'),
    ('act_reproduce --case other --out {t}/x', 'no case'), ('act_reproduce', 'needs --out'), ('act_baselines --case other --out {t}/x', 'no case'), ('act_baselines', 'needs --out'), ('act_smollm2 --train nothing', 'no recipe')])
def test_bad_input_is_one_line_and_leaves_nothing(run, files, line, words):
    import shutil
    from act.lab import lab_path
    t = files
    with quiet(): tiny_model().save_pretrained(t/'tiny')
    (t/'full').mkdir(); (t/'empty.jsonl').write_text(''); (t/'bad.jsonl').write_text('{"prompt": "a", "answer": "b"}\n{"prompt"\n')
    shutil.copytree(lab_path('maths-en'), t/'cut')
    raw = (t/'cut'/'model.safetensors').read_bytes()
    (t/'cut'/'model.safetensors').write_bytes(raw[:-64])
    before = sorted(p.name for p in t.iterdir())
    code, out, err = run(line.format(t=t))
    assert code == 2 and err.count('\n') == 1 and err.startswith('error: ') and words in err
    assert sorted(p.name for p in t.iterdir()) == before
