"Commands: from the lab's models to a recovered, evaluated checkpoint; one clear line for everything that can go wrong."

import json, os, resource, shlex, shutil, signal, subprocess, sys, time, pytest
from pathlib import Path
from act.fingerprints import weight_hash
from act.loading import load_model
from act.kit import processes
from act.kit.command import command, next_step, options
from act.kit.processes import bar, quiet
from act.masks import ChannelMask
from act.scores import ChannelScores
from conftest import tiny_model
from helpers import SCRIPTS, SETTINGS, check_call, function

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent


def check_next(out):
    "Where a command says what comes next, that can be given as it is."
    lines = [l.removeprefix('next: ') for l in out.splitlines() if l.startswith('next: ')]
    for l in lines:
        if l.startswith('act_') and not l.startswith('act_lm_eval '):
            check_call(l)
    return lines


def tree(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_size) for p in Path(folder).rglob('*'))


def required(name):
    return [o.name for o in options(function(name)) if o.required]


@pytest.mark.parametrize('name', list(SCRIPTS))
def test_help(name, run, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '60')
    with pytest.raises(SystemExit) as e:
        run(f'{name} --help')
    text = capsys.readouterr().out
    assert e.value.code == 0
    assert text.startswith(f'usage: {name} ')
    assert 'exit codes: 0 done, 2 wrong input, 130 interrupted\n' in text
    assert '\ndocs: https://' in text
    assert '--dry_run' in text
    assert 'None' not in text
    purpose, examples = text.split('\n\n')[1], text.split('\nexample:\n')[1].split('\n\n')[0].splitlines()
    assert purpose
    assert '`' not in text
    assert '  ' not in purpose
    assert examples
    for e in examples:
        assert e.startswith(f'  {name}'), e
        assert e.strip() in (name, 'act_recipe list') or ' --' in e or ' act_' not in e, e  # whole, on one line
        check_call(e)
    for o in required(name):
        assert o == 'action' or text.index('\nrequired:') < text.index(f'\n  --{o} ') < text.index('\noptions:')


@pytest.mark.parametrize('name', list(SCRIPTS))
def test_what_is_missing_or_unknown_is_said_in_one_line(name, run):
    need = required(name)
    if need:
        code, out, err = run(name)
        assert code == 2
        assert not out
        assert err.startswith(f'error: {name} needs ')
        assert err.endswith(f': see {name} --help\n')
        assert all(o in err for o in need)
        assert err.count('\n') == 1
    for bad, words in (('--dry-run', '(did you mean --dry_run?)'), ('--qqq 3', 'does not know --qqq: see')):
        code, out, err = run(f'{name} {bad}')
        assert code == 2
        assert not out
        assert err.startswith('error: ')
        assert err.count('\n') == 1
        assert words in err


# ---- commands start fast

HEAVY = {'torch', 'transformers', 'datasets', 'pandas', 'matplotlib', 'lm_eval', 'huggingface_hub', 'tqdm'}


def seconds(*words):
    "Processor time of a process."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([str(w) for w in words], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope='module')
def bare():
    return seconds(sys.executable, '-c', 'pass')


@pytest.mark.parametrize('name', list(SCRIPTS))
def test_help_takes_no_time(name, bare):
    assert seconds(BIN / name, '--help') < bare + 0.3


@pytest.mark.parametrize('bad', ['--nope', '', '--scores s --out m --p much', '--out'])
def test_wrong_options_take_no_time(bad, bare):
    assert seconds(BIN / 'act_mask', *bad.split()) < bare + 0.3


def test_a_wrong_choice_takes_no_time(bare):
    assert seconds(BIN / 'act_mask', *'--scores s --out m --control some'.split()) < bare + 0.3
    assert seconds(BIN / 'act_recipe', 'jump') < bare + 0.3


@pytest.mark.parametrize('module', sorted({where.split(':')[0] for where in SCRIPTS.values()}))
def test_commands_import_nothing_heavy(module):
    code = f'import {module}, sys; print(*(n for n in {sorted(HEAVY)} if n in sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '', done.stderr


# ---- where help leads


@pytest.mark.parametrize('name', list(SCRIPTS))
def test_help_names_a_page_that_exists(name):
    address = function(name).parser().epilog.splitlines()[-1].removeprefix('docs: ')
    site = f"{SETTINGS['DEFAULT']['doc_host']}{SETTINGS['DEFAULT']['doc_baseurl']}"
    page = address.removeprefix(f'{site}/').removesuffix('.html')
    assert len(list(ROOT.glob(f'nbs/[0-9][0-9]_{page}.ipynb'))) == 1, address


@pytest.mark.parametrize('name', list(SCRIPTS))
def test_every_option_says_what_it_is(name):
    assert not [o.name for o in options(function(name)) if not o.help.strip()]


def test_help_tells_the_way_from_studies_and_tools():
    kinds = {name: function(name).parser().epilog.splitlines()[-3] for name in SCRIPTS}
    way = [name for name, kind in kinds.items() if kind.startswith('the way: ')]
    assert sorted(way) == sorted(kinds['act_mask'].removeprefix('the way: ').split(', '))
    assert {kinds[n].split(' ')[1] for n in SCRIPTS if n not in way} == {'study', 'tool'}


def test_the_version(run, capsys):
    with pytest.raises(SystemExit) as e:
        run('act_mask --version')
    from act import __version__

    assert e.value.code == 0
    assert capsys.readouterr().out == f'act {__version__}\n'


def test_a_value_of_the_wrong_type(run):
    code, out, err = run('act_mask --scores s --out m --p much')
    assert code == 2
    assert not out
    assert err.count('\n') == 1
    assert "--p: invalid float value: 'much': see act_mask --help" in err


def test_the_pipeline(run, tmp_path):
    t = tmp_path
    (t / 'mine.jsonl').write_text('\n'.join(json.dumps(dict(prompt=f'2+{i}', answer=f'={2 + i}')) for i in range(8)))
    assert (
        run(
            'act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --n 40 --out'
            f' {t}/s.safetensors'
        )[0]
        == 0
    )
    assert run(f'act_mask --scores {t}/s.safetensors --p 0.1 --rank module --out {t}/m.safetensors')[0] == 0
    assert run(f'act_mask --scores {t}/s.safetensors --p 0.1 --control random --seed 3 --out {t}/r.safetensors')[0] == 0
    assert (
        run(f'act_mask --scores {t}/s.safetensors --p 0.1 --rank module --whole embedding --out {t}/w.safetensors')[0]
        == 0
    )
    m, r = (ChannelMask.load(t / f'{n}.safetensors') for n in 'mr')
    assert m.count == r.count == round(0.1 * m.total)
    assert m != r
    assert ChannelMask.load(t / 'w.safetensors')['model.embed_tokens'].all()
    assert ChannelScores.load(t / 's.safetensors').meta['items'] == 40
    code, out, _ = run(
        f'act_transfer --target lab/maths-en --donor lab/base --mask {t}/m.safetensors --lam 0.5 --out {t}/moved'
    )
    assert check_next(out) == [f'act_finetune --model {t}/moved --ability ABILITY --out {t}/tuned']
    assert code == 0
    assert f'{m.count:,} of {m.total:,} channels from lab/base, lam 0.5' in out
    assert (
        run(
            f'act_finetune --model {t}/moved --ability lab/science-zh,{t}/mine.jsonl --mask {t}/m.safetensors --steps 2'
            f' --batch_size 4 --out {t}/tuned'
        )[0]
        == 0
    )
    line = f'act_evaluate --model {t}/tuned --ability lab/science-zh,{t}/mine.jsonl --n 8 --out {t}/e.json'
    code, out, _ = run(line)
    assert code == 0
    assert 'science-zh' in out
    assert 'mine' in out
    e = json.loads((t / 'e.json').read_text())
    assert e['meta']['weights'] == weight_hash(t / 'tuned')
    assert e['meta']['provenance' if 'provenance' in e['meta'] else 'git']
    assert len(e['items']['id']) == 16
    a, b = load_model(t / 'moved')[0], load_model(t / 'tuned')[0]
    assert a.dtype == b.dtype
    assert weight_hash(a) != weight_hash(b)
    assert (t / 'tuned' / 'act_transfer.json').read_bytes() == (t / 'moved' / 'act_transfer.json').read_bytes()
    made = {n: json.loads((t / f).read_text()) for n, f in RECORDS.items()}
    argv = {n: (d.get('provenance') or d['meta'])['argv'] for n, d in made.items()}
    assert argv['act_evaluate'] == ['act_evaluate', *line.split()[1:]]
    assert {n: a[0] for n, a in argv.items()} == {n: n for n in RECORDS}


RECORDS = dict(act_transfer='moved/act_transfer.json', act_finetune='tuned/act_finetune.json', act_evaluate='e.json')


def test_the_score_matrix_as_json(run):
    from act.zoo.lab_training import lab_models

    code, out, _ = run('act_lab --json')
    d = json.loads(out)
    assert code == 0
    assert d['base']['science-zh'] >= 0.9
    assert list(d) == lab_models()
    assert len(d['maths-en']) == 24
    assert 'maths-en' in run('act_lab --models maths-en')[1]


def test_several_donors_by_commas(run, tmp_path):
    t = tmp_path
    for n, d in (('a', 'lab/science-zh'), ('b', 'lab/science-es')):
        assert (
            run(f'act_localize --target lab/base --donor {d} --ability lab/chemistry-zh --n 16 --out {t}/{n}.s')[0] == 0
        )
        assert run(f'act_mask --scores {t}/{n}.s --p 0.05 --out {t}/{n}.m')[0] == 0
    assert (
        run(
            f'act_transfer --target lab/base --donor lab/science-zh,lab/science-es --mask {t}/a.m,{t}/b.m --lam'
            f' 0.5,0.25 --out {t}/merged'
        )[0]
        == 0
    )
    assert [m['lam'] for m in json.loads((t / 'merged' / 'act_transfer.json').read_text())['moved']] == [0.5, 0.25]


@pytest.fixture
def files(run, tmp_path):
    run(f'act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --n 8 --out {tmp_path}/s')
    run(f'act_mask --scores {tmp_path}/s --p 0.1 --out {tmp_path}/m')
    run(f'act_delta --target lab/maths-en --donor lab/base --mask {tmp_path}/m --out {tmp_path}/d')
    return tmp_path


@pytest.mark.parametrize(
    'line, words',
    [
        ('act_mask --scores {t}/s --p 0 --out {t}/x', 'fraction of all channels'),
        ('act_mask --scores {t}/s --p 1.5 --out {t}/x', 'fraction of all channels'),
        ('act_mask --scores {t}/s --rank best --out {t}/x', "choose 'raw' or 'module'"),
        ('act_mask --scores {t}/m --out {t}/x', 'format'),
        ('act_mask --scores {t}/none --out {t}/x', 'no score file'),
        ('act_mask', 'needs --scores'),
        ('act_transfer --target lab/maths-en --donor lab/base --mask {t}/m --lam nan --out {t}/x', 'lam is nan'),
        ('act_transfer --target lab/maths-en --donor lab/base --mask {t}/m --lam much --out {t}/x', "lam is 'much'"),
        ('act_transfer --target lab/swahili --donor lab/base --mask {t}/m --out {t}/x', 'another target'),
        ('act_transfer --target lab/maths-en --donor lab/swahili --mask {t}/m --out {t}/x', 'another donor'),
        ('act_transfer --target lab/maths-en --donor {t}/tiny --mask {t}/m --out {t}/x', 'differ in'),
        ('act_transfer --target lab/maths-en --donor lab/base --mask {t}/s --out {t}/x', 'not a usable mask'),
        ('act_transfer --target lab/maths-en --donor lab/base --mask {t}/m --out {t}/full', 'exists already'),
        ('act_transfer --target lab/maths-en', 'needs --donor, --mask and --out'),
        ('act_localize --target lab/maths-en --donor {t}/tiny --ability lab/science-zh --out {t}/x', 'differ in'),
        ('act_localize --target lab/maths-en --donor lab/base --ability lab/science-xx --out {t}/x', 'no lab ability'),
        (
            'act_localize --target lab/maths-en --donor lab/base --ability {t}/bad.jsonl --out {t}/x',
            'bad.jsonl, line 2',
        ),
        (
            'act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --max_length 3 --out {t}/x',
            'no answer tokens left',
        ),
        ('act_localize --target lab/nobody --donor lab/base --ability lab/science-zh --out {t}/x', 'no lab model'),
        ('act_localize --target {t}/cut --donor lab/base --ability lab/science-zh --out {t}/x', 'truncated'),
        (
            'act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --dtype half --out {t}/x',
            "dtype is 'half'",
        ),
        (
            'act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --device gpu9 --out {t}/x',
            "device is 'gpu9'",
        ),
        (
            'act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --out {t}/s/x',
            'cannot create the folder',
        ),
        ('act_transfer --target lab/maths-en --donor lab/base --mask {t}/m --rule most --out {t}/x', "rule is 'most'"),
        ('act_finetune --model lab/base --ability lab/science-zh --steps 0 --out {t}/x', 'above zero'),
        ('act_finetune --model {t}/tiny --ability lab/science-zh --mask {t}/m --out {t}/x', 'tiny'),
        ('act_finetune --model lab/base --ability lab/science-zh --lora_r -1 --out {t}/x', 'lora_r is -1'),
        ('act_finetune --model lab/base --ability lab/science-zh --mask {t}/m --lora_r 4 --out {t}/x', 'neither LoRA'),
        ('act_evaluate --model lab/base --ability lab/science-zh --chat --out {t}/x', 'no chat template'),
        ('act_evaluate --model lab/base --ability lab/science-zh,lab/science-zh --out {t}/x', 'share a name'),
        ('act_evaluate --model lab/base --ability lab/science-zh --out {t}/s/x', 'cannot create the folder'),
        ('act_delta --target lab/swahili --donor lab/base --mask {t}/m --out {t}/x', 'another target'),
        ('act_apply --target lab/base --delta {t}/m --out {t}/x', 'not a usable delta'),
        ('act_undo --target lab/base --delta {t}/d --in_place', 'not a folder'),
        ('act_apply --target lab/base --delta {t}/d', '--in_place'),
        ('act_apply --target lab/base --delta {t}/d --out {t}/x', 'not what the delta was made for'),
        ('act_undo --target {t}/plain --delta {t}/d --in_place', 'not what the delta made'),
        ('act_findings --finding colour --out {t}/x', 'no finding'),
        ('act_findings --finding stability --family none --out {t}/x', 'no family'),
        ('act_merge --case other --out {t}/x', 'no merge'),
        ('act_merge --seeds 0 --out {t}/x', 'seeds is 0'),
        ('act_lab --train --models nobody --out {t}/x', 'no lab model'),
        ('act_plan --measure {t}', 'needs --constants'),
        ('act_recipe jump', 'choose list, copy, run, resume or report'),
        ('act_recipe resume --out {t}/full', 'holds no run'),
        ('act_recipe run --recipe {t}/none.yaml --out {t}/x', 'neither the name of a recipe nor a file'),
        ('act_finetune --model lab/base --ability lab/science-zh --out {t}/full', 'exists already'),
        ('act_evaluate --model lab/base --ability {t}/empty.jsonl --out {t}/x', 'holds no items'),
        ('act_evaluate --model {t}/cut --ability lab/science-zh', 'truncated'),
        ('act_lab --train', 'needs --out'),
        ('act_recover --case other --out {t}/x', 'no case'),
        ('act_reproduce --recipe other --out {t}/x', 'no recipe'),
        ('act_reproduce --device gpu9 --out {t}/x', "device is 'gpu9'"),
        ('act_reproduce', 'needs --out'),
        ('act_baselines --case other --out {t}/x', 'no case'),
        ('act_baselines', 'needs --out'),
        ('act_smollm2 --train nothing', 'no recipe'),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, files, line, words):
    from act.zoo.lab_training import lab_path

    t = files
    with quiet():
        tiny_model().save_pretrained(t / 'tiny')
    (t / 'full').mkdir()
    (t / 'empty.jsonl').write_text('')
    (t / 'bad.jsonl').write_text('{"prompt": "a", "answer": "b"}\n{"prompt"\n')
    shutil.copytree(lab_path('maths-en'), t / 'cut')
    if '{t}/plain' in line:
        shutil.copytree(lab_path('maths-en'), t / 'plain')
    raw = (t / 'cut' / 'model.safetensors').read_bytes()
    (t / 'cut' / 'model.safetensors').write_bytes(raw[:-64])
    before = tree(t)
    code, out, err = run(line.format(t=t))
    assert code == 2
    assert err.count('\n') == 1
    assert err.startswith('error: ')
    assert words in err
    assert tree(t) == before
    assert (
        run(f'{line.format(t=t)} --dry_run') == (2, out, err) or line.startswith('act_recipe') and 'dry_run' in line
    ), 'a dry run says the same'
    assert tree(t) == before


@pytest.mark.parametrize(
    'line',
    [
        'act_lab --train --out {t}/x',
        'act_lab --train --out {t}/x/y/z --models maths-en',
        'act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --out {t}/x',
        'act_mask --scores {t}/s --out {t}/x',
        'act_transfer --target lab/maths-en --donor lab/base --mask {t}/m --out {t}/x',
        'act_delta --target lab/maths-en --donor lab/base --mask {t}/m --out {t}/x',
        'act_apply --target lab/maths-en --delta {t}/d --out {t}/x',
        'act_apply --target {t}/plain --delta {t}/d --in_place',
        'act_finetune --model lab/base --ability lab/science-zh --mask {t}/m --out {t}/x',
        'act_evaluate --model lab/base --ability lab/science-zh --out {t}/x',
        'act_evaluate --model lab/base --ability lab/science-zh',
        'act_plan --measure {t} --constants {t}/c',
        'act_reproduce --out {t}/x',
        'act_recover --out {t}/x',
        'act_smollm2 --train maths',
        'act_findings --finding stability --out {t}/x',
        'act_baselines --out {t}/x',
        'act_merge --out {t}/x',
        'act_sizes --models {t}/family --recipes swahili --seeds 2 --out {t}/x',
        'act_recipe run --recipe lab-recover --out {t}/x',
        'act_tasks --ability lab/science-zh --out {t}/x',
        'act_explore --out {t}/x.html',
    ],
)
def test_a_dry_run_checks_and_says_and_leaves_nothing(run, files, line, monkeypatch):
    from act.zoo.lab_training import lab_path

    t = files
    (t / 'gsm8k').mkdir()
    (t / 'gsm8k' / 'train.jsonl').write_text(json.dumps(dict(question='a?', answer='b #### 1')) + '\n')
    monkeypatch.setenv('ACT_DATA', str(t))
    monkeypatch.setenv('ACT_CACHE', str(t / 'cache'))
    shutil.copytree(lab_path('maths-en'), t / 'plain')
    (t / 'family' / 'swahili-medium-2').mkdir(parents=True)
    before, here = tree(t), sorted(os.listdir('.'))
    code, out, err = run(f'{line.format(t=t)} --dry_run')
    assert (code, err) == (0, ''), err
    assert 'dry run, nothing was written\n' in out
    assert '\nwork: ' in out
    assert ('\nwrites: ' in out) == ('--out' in line or 'in_place' in line or 'measure' in line or 'smollm2' in line)
    assert 'next: ' not in out
    assert tree(t) == before
    assert sorted(os.listdir('.')) == here


def test_what_a_dry_run_expects_is_about_what_comes(run, files):
    t = files
    for line in (
        'act_mask --scores {t}/s --out {t}/x1',
        'act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --n 9 --out {t}/x2',
        'act_delta --target lab/maths-en --donor lab/base --mask {t}/m --out {t}/x3',
        'act_transfer --target lab/maths-en --donor lab/base --mask {t}/m --out {t}/x4',
        'act_evaluate --model lab/base --ability lab/science-zh --out {t}/x5',
    ):
        said = run(f'{line.format(t=t)} --dry_run')[1].split('(about ')[1].split(')')[0]
        number, unit = said.split(' ')
        code, out, _ = run(line.format(t=t))
        check_next(out)
        size = sum(
            f.stat().st_size
            for p in [Path(line.format(t=t).split()[-1])]
            for f in (p.glob('*.safetensors') if p.is_dir() else [p])
        )
        assert code == 0, line
        assert 0.5 < float(number) * dict(bytes=1, kB=1e3, MB=1e6)[unit] / size < 2, line


@pytest.mark.slow
def test_a_dry_run_sees_another_run(files):
    holder = subprocess.Popen(
        [
            sys.executable,
            '-c',
            f"from act.kit.files import exclusive\nwith exclusive('{files}/x'): print('in', flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == 'in\n'
    for line in (
        f'act_transfer --target lab/maths-en --donor lab/base --mask {files}/m --out {files}/x',
        f'act_mask --scores {files}/s --out {files}/x',
    ):
        done = subprocess.run([BIN / line.split()[0], *line.split()[1:], '--dry_run'], capture_output=True, text=True)
        assert done.returncode == 2
        assert 'another run is writing' in done.stderr
    holder.communicate('\n')
    assert holder.returncode == 0


def test_a_dry_run_fetches_no_model(run, tmp_path, monkeypatch):
    import huggingface_hub, types
    from huggingface_hub.errors import LocalEntryNotFoundError

    def absent(*_, local_files_only=False, **__):
        assert local_files_only
        raise LocalEntryNotFoundError('no')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', absent)
    monkeypatch.setattr(
        huggingface_hub,
        'model_info',
        lambda m, files_metadata: types.SimpleNamespace(
            siblings=[
                types.SimpleNamespace(rfilename=n, size=s)
                for n, s in (('config.json', 500), ('model.safetensors', 3_000_000_000), ('pytorch_model.bin', 7))
            ]
        ),
    )
    code, out, err = run(f'act_evaluate --model some/model --ability lab/science-zh --out {tmp_path}/x --dry_run')
    assert (code, err) == (0, '')
    assert 'fetch 3 GB of some/model' in out
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, 'model_info', lambda *_, **__: 1 / 0)
    assert 'could not be fetched' in run(f'act_evaluate --model some/model --ability lab/science-zh --dry_run')[2]


FINETUNE = 'act_finetune --model lab/base --ability lab/science-zh --batch_size 2 --save_steps 1 --out'


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    p = subprocess.Popen(
        [BIN / 'act_finetune', *FINETUNE.split()[1:], tmp_path / 'out', '--steps', '20000'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    for _ in range(1200):
        if list(tmp_path.glob('.out.partial/state/act-state-*/checkpoint-*/whole')) or p.poll() is not None:
            break
        time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130
    assert err == 'interrupted: give the same command again to go on\n'  # one line: no bar, no traceback
    assert out.startswith('memory: about ')
    assert out.count('\n') == 1


def test_interrupted_before_anything_was_done(monkeypatch, capsys, tmp_path):
    @command
    def act_x(out: str = 'x'):  # a file
        "Nothing: `act_x`"
        raise KeyboardInterrupt

    monkeypatch.setattr('act.kit.command.left_work', [])
    assert act_x.main([]) == 130
    assert capsys.readouterr().err == 'interrupted: nothing is left of this run, the same command starts it again\n'


def test_what_is_not_expected_keeps_its_traceback():
    @command
    def act_x(n: int = 1):  # a number
        "Nothing: `act_x`"
        return n / 0

    with pytest.raises(ZeroDivisionError):
        act_x.main([])


def closed():
    "The writing end of a pipe that nobody reads."
    r, w = os.pipe()
    os.close(r)
    return w


@pytest.mark.slow
def test_a_pipe_that_nobody_reads(files):
    for args in (['--scores', files / 's', '--out', files / 'x'], ['--help']):
        done = subprocess.run([BIN / 'act_mask', *args], stdout=closed(), stderr=subprocess.PIPE, text=True)
        assert done.stderr == ''
        assert done.returncode in (141, 0 if '--help' in args else 141)
    assert ChannelMask.load(files / 'x').count  # printing comes after writing


@pytest.mark.slow
def test_piped_output_holds_results_alone(files):
    done = subprocess.run(
        [BIN / 'act_evaluate', *f'--model lab/base --ability lab/science-zh --n 16 --out {files}/e.json'.split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stderr == ''
    assert '\r' not in done.stdout
    assert 'science-zh' in done.stdout
    assert f'-> {files}/e.json' in done.stdout


def test_bars(monkeypatch, capsys):
    import io

    list(bar(range(3), desc='a'))
    assert capsys.readouterr().err == ''  # short
    late = processes.log_options()
    monkeypatch.setattr(processes, 'log_options', lambda: late | dict(delay=0, mininterval=0))
    list(bar(range(3), desc='a', unit='step'))
    err = capsys.readouterr().err
    assert '\r' not in err
    assert err.splitlines()[-1].startswith('a 3 of 3 step, 00:00')
    list(bar(range(3), False, desc='a'))
    assert capsys.readouterr().err == ''

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, 'stderr', Terminal())
    list(bar(range(3), desc='a'))
    assert '\r' in sys.stderr.getvalue()


def test_all_bars_off():
    code = (
        "from act.kit import processes as p; log = p.log_options();"
        " p.log_options = lambda: log | dict(delay=0, mininterval=0); list(p.bar(range(3)))"
    )
    err = lambda **env: (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | env).stderr
    )
    assert err()
    assert not err(TQDM_DISABLE='1')


def test_next_steps_are_quoted_and_known(run, files, capsys):
    next_step('act_mask', scores='a b.s', p=None, out="it's")
    assert shlex.split(capsys.readouterr().out.removeprefix('next: ')) == [
        'act_mask',
        '--scores',
        'a b.s',
        '--out',
        "it's",
    ]
    t = files
    for line in (
        'act_lab',
        'act_apply --target lab/maths-en --delta {t}/d --out {t}/ap',
        'act_undo --target {t}/ap --delta {t}/d --in_place',
        'act_plan --target lab/maths-en --donor lab/base --mask {t}/m',
        'act_evaluate --model lab/base --ability lab/science-zh --n 4',
    ):
        code, out, err = run(line.format(t=t))
        assert code == 0, (out, err)
        assert len(check_next(out)) == 1, (out, err)
