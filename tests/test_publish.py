"""Publishing: what is written loads back, and the hub gets what the folder holds.

The card says what the records say and nothing else.
"""

import base64, hashlib, json, os, re, shutil, subprocess, sys, threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest, torch, yaml
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM
from act.tools import history as H, publish as P, retrace
from act.sources import load_ability
from act.fingerprints import weight_hash
from act.loading import channels_of, load_model, load_tokenizer, resolve
from act.zoo.gguf import from_gguf
from act.commands.tools import act_delta
from act.commands.way import act_evaluate, act_localize, act_mask, act_transfer
from act.kit.errors import ActError
from act.kit.processes import quiet
from act.apply import apply_delta
from act.deltas import Delta, make_delta
from act.evaluate import EvalResult, evaluate
from act.localize import localize
from act.masks import ChannelMask, top_p
from act.tools.card import Card
from act.tools.history import history, licence_of
from act.tools.publish import prepare, publish, push
from act.streaming import transfer_checkpoint
from act.transfer import transfer
from conftest import tiny_model

LAB = 'lab/maths-en', 'lab/base'


def scored(model, n=12, abilities=('lab/science-zh',)):
    net, tok = load_model(model)
    r = evaluate(net, [load_ability(a, n=n) for a in abilities], tok, progress=False)
    r.meta.update(model=str(model), weights=weight_hash(model))
    return r


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A transfer between two lab models as the commands write it: (folder, mask, folder of the result, results)."
    t = tmp_path_factory.mktemp('made')
    scores, mask, moved = t / 'scores.safetensors', t / 'm.safetensors', t / 'moved'
    act_localize(*LAB, ability='lab/science-zh', out=scores, n=24)
    act_mask(scores=scores, p=0.1, rank='module', out=mask)
    act_transfer(*LAB, mask=mask, lam=0.5, out=moved)
    results = []
    for i, model in enumerate((moved, *LAB)):
        act_evaluate(model=model, ability='lab/science-zh', n=12, out=t / f'{i}.json')
        results.append(EvalResult.load(t / f'{i}.json'))
    return t, ChannelMask.load(mask), moved, results


@pytest.fixture(scope='module')
def out(made):
    t, mask, moved, results = made
    return publish(moved, t / 'published', scores=results, mask=mask)


def same(a, b):
    return {f.name: f.read_bytes() for f in Path(a).iterdir() if f.is_file()} == {
        f.name: f.read_bytes() for f in Path(b).iterdir() if f.is_file()
    }


def files(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in Path(folder).rglob('*')
        if f.is_file() and '.cache' not in f.parts
    }


def bash(card):
    return [
        l
        for b in re.findall(r'```bash\n(.*?)```', card.text.split('## How to reproduce')[1], re.S)
        for l in b.splitlines()
    ]


def test_it_loads_back_as_what_the_transfer_gave(made, out):
    _, mask, moved, _ = made
    target, tok = load_model(LAB[0])
    ids = tok('两个氢', return_tensors='pt').input_ids
    with quiet():
        net = AutoModelForCausalLM.from_pretrained(out, use_safetensors=True)
    assert torch.equal(net(ids).logits, transfer(target, load_model(LAB[1])[0], mask, 0.5)(ids).logits)
    assert load_tokenizer(out)('两个氢')['input_ids'] == ids[0].tolist()
    assert (out / 'model.safetensors').read_bytes() == (moved / 'model.safetensors').read_bytes()
    assert ChannelMask.load(out / 'act' / 'mask.safetensors') == mask
    assert set(files(out)) == {
        'README.md',
        'channels.png',
        'config.json',
        'generation_config.json',
        'model.safetensors',
        'tokenizer.json',
        'tokenizer_config.json',
        'act_transfer.json',
        'act/mask.safetensors',
    }


def test_front_matter_is_what_the_hub_reads(made, out):
    d, t = ModelCard.load(out / 'README.md').data, made[3][0].table()
    assert (d.base_model, d.base_model_relation, d.license, d.library_name, d.pipeline_tag, d.language, d.tags) == (
        list(LAB),
        'merge',
        'apache-2.0',
        'transformers',
        'text-generation',
        ['zh'],
        ['act-transfer', 'merge'],
    )
    got = {(r.dataset_config, r.metric_type): r for r in d.eval_results}
    r = got['science-zh', 'accuracy']
    assert r.metric_value == round(t.accuracy['science-zh'], 4)
    assert f"{t.low['science-zh']:.3f} to {t.high['science-zh']:.3f}" in r.metric_name
    assert r.dataset_split == 'test'
    assert d.model_name == 'published'
    assert got['science-zh', 'bits_per_byte'].metric_value == round(t.bits_per_byte['science-zh'], 4)


def test_two_abilities_stay_two_results_in_the_front_matter(made):
    r = scored(made[2], 4, ('lab/science-zh', 'lab/science-es'))
    d = ModelCard(str(prepare(made[2], r).card('me/x'))).data
    assert [(o.dataset_config, o.metric_type) for o in d.eval_results] == [
        (a, m) for a in ('science-zh', 'science-es') for m in ('accuracy', 'bits_per_byte')
    ]
    assert d.model_name == 'x'


def score(result):
    "Accuracy, interval and bits per byte of the first ability, as a card has them."
    row = result.table().iloc[0]
    interval = f'[{100 * row.low:.1f}, {100 * row.high:.1f}]'
    return f'{100 * row.accuracy:.1f} % {interval}; {row.bits_per_byte:.3f}'


def test_the_card_says_what_was_moved_and_what_came_of_it(made, out):
    _, mask, moved, results = made
    text = ModelCard.load(out / 'README.md').text
    assert (
        f"| `lab/base` | `science-zh` | 0.1 | `module` | 0.5 | {mask.count:,} of {mask.total:,} (10.0 %) |"
        f" `{mask.hash[:12]}` |" in text
    )
    assert weight_hash(moved) in text
    assert mask.hash in text
    assert mask.meta['ability_hash'] in text
    assert mask.meta['target_print'] in text
    for k, n in mask.frame().groupby('kind')['sum'].sum().items():
        assert f'| {k} | {int(n):,} |' in text
    assert '| ability | items | this model | target | donor |' in text
    assert f"| `science-zh` | 12 | {' | '.join(map(score, results))} |" in text
    assert '](channels.png)' in text
    assert re.search(r'!\[Heat map .+ \d+ %\.\]', text)
    assert (out / 'channels.png').read_bytes()[:4] == b'\x89PNG'
    assert '| `lab/maths-en` | `apache-2.0` | ships with act-transfer |' in text
    assert '\n```yaml\nbase_model:' in '\n' + Card.load(out / 'README.md')._repr_markdown_()
    assert '\n#' not in Card.load(out / 'README.md')._repr_markdown_().replace('\n# ', '')


def test_the_commands_of_the_card_make_it_again_to_the_byte(out, run, tmp_path, monkeypatch):
    lines = bash(Card.load(out / 'README.md'))
    assert [l.split()[0] for l in lines] == ['act_localize', 'act_mask', 'act_transfer', *['act_evaluate'] * 3]
    monkeypatch.chdir(tmp_path)
    for l in lines[:3]:
        assert run(l)[0] == 0, l
    assert (tmp_path / 'moved' / 'model.safetensors').read_bytes() == (out / 'model.safetensors').read_bytes()


def channel_rows(card):
    "The rows of the tables that say where the channels lie, sorted."
    part = card.text.split('## Channels')[1].split('## Scores')[0]
    return sorted(line for line in part.splitlines() if line.startswith('|'))


def test_without_mask_and_scores_the_card_says_so(made):
    text = prepare(made[2]).card().text
    assert 'No evaluation was given.' in text
    assert 'channels.png' not in text


def test_the_record_knows_how_many_channels_moved_where_without_the_mask(made):
    rows = channel_rows(prepare(made[2]).card())
    assert rows == channel_rows(prepare(made[2], mask=made[1]).card())
    assert len(rows) > 12


def test_without_mask_and_that_part_of_the_record_nothing_is_known(made):
    old = prepare(made[2])
    for m in old.last.record['moved']:
        del m['where']
    assert 'The mask file is not part of this folder' in old.card().text


def test_without_mask_no_command_is_invented(made):
    card = prepare(made[2]).card()
    assert bash(card) == [
        'act_transfer --target lab/maths-en --donor lab/base --mask m.safetensors --out moved --lam 0.5'
    ]
    assert 'act_localize --' not in card.text
    assert '--split' not in card.text


def mask_lines(mask):
    return retrace.commands_of_mask(mask, 'm.safetensors')


def test_a_mask_that_a_command_made_has_its_two_commands(made):
    assert mask_lines(made[1]) == [
        'act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --n 24 --out scores.safetensors',
        'act_mask --scores scores.safetensors --p 0.1 --rank module --out m.safetensors',
    ]


def test_what_was_done_to_a_mask_in_python_is_added(made):
    assert mask_lines(~made[1])[2:] == ['# then, in Python: complement']


def test_a_mask_without_commands_has_its_settings(made):
    (line,) = mask_lines(ChannelMask(made[1].data, made[1].map, dict(made[1].meta, commands=None)))
    start = f'# mask {made[1].hash[:12]} (no command line recorded): target lab/maths-en, donor lab/base'
    assert line.startswith(f'{start}, ability science-zh')
    assert 'p 0.1, rank module' in line


@pytest.mark.parametrize('words', [None, 'act_mask', [], [1], ['act_mask', None]])
def test_what_is_no_command_line_is_left_out(words):
    assert retrace.command_line(words) == ''


def test_a_command_line_loses_its_folders_and_its_line_breaks():
    words = ['act_transfer', '--mask=/home/ann/a.safetensors', '--donor', '/home/ann/x,lab/base', '--out', 'a`\nb']
    assert retrace.command_line(words) == "act_transfer --mask=a.safetensors --donor x,lab/base --out 'a'\"'\"' b'"


def test_a_step_from_python_has_its_settings(made):
    step = history(made[2])[0]
    without = replace(step, record={k: v for k, v in step.record.items() if k != 'provenance'})
    line = retrace.command_of_step(without)
    start = '# moved, transfer (no command line recorded): target lab/maths-en, rule sum, donor lab/base, lam 0.5'
    assert line == f'{start}, mask {made[1].hash}, ability science-zh, p 0.1, rank module'


def test_a_record_from_before_command_lines_is_read(tmp_path):
    "Fine-tuning then kept the model, time and revision at the top level."
    made = dict(model='lab/base', time='2025-01-01T00:00:00Z', git='0123456789ab', versions=dict(act='0.0.1'))
    record = dict(made, abilities={'science-zh': dict(hash='0' * 64, items=3)}, steps=2, lr=1e-4)
    (tmp_path / 'm').mkdir()
    (tmp_path / 'm' / 'act_finetune.json').write_text(json.dumps(record))
    (step,) = history(tmp_path / 'm')
    assert step.inputs == ['lab/base']
    assert step.provenance['git'] == '0123456789ab'
    line = '# m, finetune (no command line recorded): model lab/base, steps 2, lr 0.0001'
    assert retrace.command_of_step(step) == line


# what must not get out
def test_nothing_of_this_machine_gets_out(made, tmp_path):
    home = tmp_path / 'ann-private'
    for n, m in (('mine', LAB[0]), ('theirs', LAB[1])):
        shutil.copytree(resolve(m), home / n)
    (home / 'mine' / 'notes.txt').write_text('ann-private')
    (home / 'mine' / 'training_args.json').write_text('"ann-private"')
    for f, k in (('config.json', '_name_or_path'), ('tokenizer_config.json', 'name_or_path')):
        (home / 'mine' / f).write_text(
            json.dumps(dict(json.loads((home / 'mine' / f).read_text()), **{k: str(home / 'mine')}))
        )
    (home / 'q.jsonl').write_text('\n'.join(json.dumps(dict(prompt=f'{i}+1=', answer=f' {i + 1}')) for i in range(8)))
    pair = home / 'mine', home / 'theirs'
    scores, mask, moved, delta, result = (home / n for n in ('s.st', 'm.st', 'moved', 'd.safetensors', 'r.json'))
    act_localize(*pair, ability=home / 'q.jsonl', split='all', out=scores)
    act_mask(scores=scores, p=0.05, out=mask)
    act_transfer(*pair, mask=mask, out=moved)
    act_delta(*pair, mask=mask, out=delta)
    act_evaluate(model=moved, ability='lab/science-zh', n=4, out=result)
    for what, name in ((moved, 'a'), (delta, 'b')):
        o = publish(what, tmp_path / name, scores=result, mask=mask)
        for f, data in files(o).items():
            assert (
                b'ann-private' not in data
                and str(tmp_path).encode() not in data
                and str(Path.home()).encode() + b'/' not in data
            ), f
        d = ModelCard.load(o / 'README.md').data
        assert d.base_model == ['mine', 'theirs']
        assert d.license is None
        load_model(o) if name == 'a' else None
    assert (tmp_path / 'a' / 'model.safetensors').read_bytes() == (moved / 'model.safetensors').read_bytes()
    assert 'notes.txt' not in files(tmp_path / 'a')
    assert bash(Card.load(tmp_path / 'a' / 'README.md')) == [
        'act_localize --target mine --donor theirs --ability q.jsonl --split all --out s.st',
        'act_mask --scores s.st --p 0.05 --out m.st',
        'act_transfer --target mine --donor theirs --mask m.st --out moved',
        'act_evaluate --model moved --ability lab/science-zh --out r.json --n 4',
    ]


@pytest.mark.parametrize(
    'given, want',
    [
        ('/home/a/x', 'x'),
        ('~/x/', 'x'),
        ('../x', 'x'),
        ('C:\\u\\x', 'x'),
        ('a/b/c', 'c'),
        ('Q/Q2', 'Q/Q2'),
        ('q.gguf', 'q.gguf'),
        ('d/q.gguf', 'q.gguf'),
        ('gpt2', 'gpt2'),
        ('/c/models--gpt2/snapshots/1a', 'gpt2'),
        ('/c/models--a--b-c/snapshots/1a', 'a/b-c'),
    ],
)
def test_names(given, want):
    assert H.shown_name(given) == want


@pytest.mark.parametrize(
    'given, want',
    [
        ('--mask=/h/a.st,/h/b.st', '--mask=a.st,b.st'),
        ('/h/x,lab/base', 'x,lab/base'),
        ('/h/q.jsonl, 4 of 9', 'q.jsonl, 4 of 9'),
    ],
)
def test_words_and_texts_lose_folders_alone(given, want):
    assert H.without_paths(given) == want


def test_a_published_record_still_has_its_command_line(made, tmp_path):
    shutil.copytree(made[2], tmp_path / 'm')
    f = tmp_path / 'm' / 'act_transfer.json'
    record = json.loads(f.read_text())
    record['provenance']['argv'] = ['act_transfer', '--donor', 'lab/base,/h/x', '--mask=/h/a.st,/h/b.st', '--out=/h/m']
    f.write_text(json.dumps(record))
    (step,) = history(publish(tmp_path / 'm', tmp_path / 'o'))
    assert step.provenance['argv'] == ['act_transfer', '--donor', 'lab/base,x', '--mask=a.st,b.st', '--out=m']


def test_strange_records_do_not_break_the_card(made, tmp_path):
    shutil.copytree(made[2], tmp_path / 'm')
    f = tmp_path / 'm' / 'act_transfer.json'
    r = json.loads(f.read_text())
    r['moved'][0].update(ability='x` | <script>\n## y\n```\n', rank='a|b')
    f.write_text(json.dumps(r))
    text = prepare(tmp_path / 'm').card().text
    row = next(l for l in text.splitlines() if l.startswith('| `lab/base`'))
    assert len(re.split(r'(?<!\\)\|', row)) == 9
    assert '\n## y' not in text
    assert text.count('```') % 2 == 0
    assert 'x\' \\| <script> ## y' in row


# licences
def parent(tmp_path, name, readme=None, text=None):
    shutil.copytree(resolve(LAB[name == 'd']), tmp_path / name)
    if readme is not None:
        (tmp_path / name / 'README.md').write_text(readme)
    if text is not None:
        (tmp_path / name / 'LICENSE.txt').write_text(text)
    return tmp_path / name


@pytest.mark.parametrize(
    'files, id, said',
    [
        (dict(readme='---\nlicense: mit\n---\nx'), 'mit', 'README.md of t'),
        (dict(text='   Apache License\n  Version 2.0'), 'apache-2.0', 'LICENSE.txt of t'),
        (dict(text='do as you like'), None, 'look before'),
        (dict(), None, 'not stated by t: look before you share'),
        (dict(readme='---\nlicense: [mit, gpl]\n---\n'), None, 'names several'),
        (dict(readme='---\n: : bad\n---\n'), None, 'not stated'),
        (dict(readme='---\nlicense: other\nlicense_name: qwen\nlicense_link: L\n---\n'), 'other', 'README.md of t'),
    ],
)
def test_a_folders_licence_is_where_its_makers_wrote_it(tmp_path, files, id, said):
    l = licence_of(parent(tmp_path, 't', **files))
    assert l.id == id
    assert said in l.said
    assert id != 'other' or (l.name, l.link) == ('qwen', 'L')


@pytest.mark.parametrize(
    't, d, id, words',
    [
        ('mit', 'mit', 'mit', 'as its parents'),
        ('mit', 'llama3.1', None, 'do not state one and the same'),
        ('mit', None, None, 'look before you share'),
    ],
)
def test_parents_have_to_agree_or_somebody_to_decide(tmp_path, t, d, id, words, monkeypatch):
    a, b = (parent(tmp_path, n, readme=f'---\nlicense: {l}\n---\n' if l else None) for n, l in (('t', t), ('d', d)))
    channels = channels_of(a)
    mask = ChannelMask.from_flat(torch.arange(channels.total) < 9, channels)
    moved = transfer_checkpoint(a, b, mask, 1.0, tmp_path / 'moved')
    pub = prepare(moved)
    assert pub.licence.id == id
    assert words in pub.card().text
    assert ModelCard(str(pub.card())).data.license == id
    monkeypatch.setattr(P, 'hub_is_off', lambda: False)
    if id is None:
        publish(pub, tmp_path / 'o')
        with pytest.raises(ActError, match='give --license'):
            push(tmp_path / 'o', 'me/x', token='t')
    decided = prepare(moved, license='gpl-3.0').card()
    assert decided.data.license == 'gpl-3.0'
    assert 'decided by whoever publishes this' in decided.text
    assert f'| `t` | `{t}` |' in decided.text
    assert licence_of(moved).id == id


def test_hub_ids_are_not_looked_up_offline(monkeypatch):
    monkeypatch.setattr(H.ModelCard, 'load', lambda *a, **k: 1 / 0)
    assert licence_of('Qwen/Qwen2.5-1.5B') == H.Licence(
        None, 'not stated by Qwen/Qwen2.5-1.5B on this machine, and the hub is switched off: look before you share'
    )
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    monkeypatch.setattr(H.ModelCard, 'load', lambda *a, **k: ModelCard('---\nlicense: mit\n---\n'))
    assert licence_of('Qwen/Qwen2.5-1.5B')[:2] == ('mit', 'model card of Qwen/Qwen2.5-1.5B')


# several steps, deltas
def test_a_tuned_model_tells_both_steps(made, run, tmp_path, monkeypatch):
    monkeypatch.chdir(made[0])
    assert (
        run(
            'act_finetune --model moved --ability lab/science-zh --steps 2 --lr 1e-4 --batch_size 4 --mask'
            f' m.safetensors --out {tmp_path}/tuned'
        )[0]
        == 0
    )
    pub = prepare(tmp_path / 'tuned', mask='m.safetensors')
    assert [(s.kind, s.name) for s in pub.steps] == [('transfer', 'moved'), ('finetune', 'tuned')]
    assert [n for n, _ in pub.licences] == list(LAB)
    o = publish(pub, tmp_path / 'o')
    assert {'act_transfer.json', 'act_finetune.json'} <= set(files(o))
    assert [s.kind for s in history(o)] == ['transfer', 'finetune']
    lines = bash(Card.load(o / 'README.md'))
    assert lines[3] == (
        'act_finetune --model moved --ability lab/science-zh --steps 2 --lr 1e-4 --batch_size 4 --mask m.safetensors'
        ' --out tuned'
    )
    assert 'fine-tuned on `science-zh` (2 steps, learning rate 0.0001)' in (o / 'README.md').read_text()
    assert ModelCard.load(o / 'README.md').data.base_model_relation == 'merge'
    monkeypatch.chdir(tmp_path)  # where the folder in between is not
    assert [(s.kind, s.name) for s in history('tuned')] == [('transfer', 'moved'), ('finetune', 'tuned')]


def test_a_specialist_of_ones_own_brings_its_story(made, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run('act_finetune --model lab/maths-en --ability lab/science-es --steps 1 --batch_size 2 --out mine')[0] == 0
    transfer_checkpoint('mine', LAB[1], made[1], 1.0, 'moved', check=False)
    pub = prepare('moved')
    assert [s.kind for s in pub.steps] == ['finetune', 'transfer']
    assert pub.base_model == list(LAB)
    assert pub.licence.id == 'apache-2.0'
    assert bash(pub.card())[0].startswith('act_finetune --model lab/maths-en --ability lab/science-es')
    assert 'The target `mine`' in pub.card().text
    alone = prepare('mine').card()
    assert alone.data.base_model == ['lab/maths-en']
    assert alone.data.base_model_relation == 'finetune'
    assert '## Channels' not in alone.text


def test_models_of_one_name_and_models_changed_in_place_keep_their_parents(made, tmp_path, monkeypatch):
    t, d = tmp_path / 'a' / 'model', tmp_path / 'b' / 'model'
    for f, m, l in ((t, LAB[0], 'mit'), (d, LAB[1], 'gpl')):
        shutil.copytree(resolve(m), f)
        (f / 'README.md').write_text(f'---\nlicense: {l}\n---\n')
    pub = prepare(transfer_checkpoint(t, d, made[1], 1.0, tmp_path / 'c' / 'model'))
    assert [(n, l.id) for n, l in pub.licences] == [('model', 'mit'), ('model', 'gpl')]
    assert pub.licence.id is None
    apply_delta(t, make_delta(t, d, made[1], 1.0, tmp_path / 'delta'), inplace=True)
    pub = prepare(t)
    assert [(n, l.id) for n, l in pub.licences] == [('model', 'mit'), ('model', 'gpl')]
    assert len(pub.steps) == 1
    (t / 'README.md').unlink()
    assert [l.id for _, l in prepare(t).licences] == [None, 'gpl']


def test_a_delta_is_published_with_what_it_is_for(made, tmp_path, monkeypatch):
    t, mask, moved, results = made
    monkeypatch.chdir(t)
    act_delta(*LAB, mask='m.safetensors', lam=0.5, out='d.safetensors')
    delta = t / 'd.safetensors'
    o = publish(delta, tmp_path / 'o', scores=results, mask=mask, name='me/science')
    assert set(files(o)) == {'README.md', 'channels.png', 'delta.safetensors', 'act/mask.safetensors'}
    assert Delta.load(o / 'delta.safetensors').hash == Delta.load(delta).hash
    assert (o / 'delta.safetensors').read_bytes() == delta.read_bytes()
    applied = apply_delta(LAB[0], o / 'delta.safetensors', tmp_path / 'applied')
    assert (applied / 'model.safetensors').read_bytes() == (moved / 'model.safetensors').read_bytes()
    card = ModelCard.load(o / 'README.md')
    assert card.data.base_model == list(LAB)
    assert card.data.library_name == 'act-transfer'
    assert 'delta' in card.data.tags
    assert len(card.data.eval_results) == 2
    assert 'act_apply --target lab/maths-en --delta me/science/delta.safetensors --out recovered' in card.text
    assert Delta.load(delta).hash in card.text
    assert bash(Card.load(o / 'README.md'))[2] == (
        'act_delta --target lab/maths-en --donor lab/base --mask m.safetensors --lam 0.5 --out d.safetensors'
    )
    with pytest.raises(ActError, match='is none of'):
        prepare(delta, scores=scored('lab/swahili', 2))


# what does not belong together
def test_results_and_masks_of_others_are_refused(made, tmp_path):
    _, mask, moved, (mine, target, donor) = made

    def changed(r, **meta):
        return EvalResult(r.items, dict(r.meta, **meta))

    for r, why in (
        (changed(mine, weights='0' * 64), 'is none of this model, lab/maths-en, lab/base'),
        (changed(target, weights='0' * 64), 'which has weights'),
        (changed(mine, weights=None), 'does not say which weights'),
    ):
        with pytest.raises(ActError, match=why):
            prepare(moved, r)
    with pytest.raises(ActError, match='other items of science-zh'):
        prepare(moved, [mine, scored(LAB[0], 5)])
    for m in (~mask, [~mask], [mask, ~mask]):
        with pytest.raises(ActError, match='not one of those that moved'):
            prepare(moved, mask=m)


@pytest.mark.parametrize(
    'name, text',
    [
        ('transfer', '{"target": "x", "moved": [{}]}'),
        ('transfer', '{"target": "x", "moved": [{"donor": "d", "lam": 1, "channels": "many"}]}'),
        ('transfer', '[]'),
        ('transfer', '{'),
        ('finetune', '{}'),
        ('finetune', '{"abilities": {"a": 3}, "model": "x"}'),
    ],
)
def test_records_that_are_not_ours_are_refused(tmp_path, name, text):
    (tmp_path / 'm').mkdir()
    (tmp_path / 'm' / f'act_{name}.json').write_text(text)
    with pytest.raises(ActError, match=f'm/act_{name}.json'):
        prepare(tmp_path / 'm')


def test_two_masks_of_one_donor_are_found_as_their_union(made, tmp_path):
    a, b = (top_p(localize(*LAB, load_ability(f'lab/science-{l}', n=4), progress=False), 0.02) for l in ('zh', 'es'))
    moved = transfer_checkpoint(*LAB, [a, b], 1.0, tmp_path / 'moved')
    assert prepare(moved, mask=[a, b]).mask == a | b
    assert prepare(moved, mask=a | b).mask == a | b
    with pytest.raises(ActError, match='not one of those'):
        prepare(moved, mask=a)
    many = publish(
        transfer_checkpoint(
            LAB[0], [LAB[1], 'lab/swahili'], [a, b], [1.0, 0.5], tmp_path / 'many', check=False, rule='mean'
        ),
        tmp_path / 'o',
        mask=[b, a],
    )
    card = Card.load(many / 'README.md')
    assert {f for f in files(many) if f.startswith('act/')} == {'act/mask-1.safetensors', 'act/mask-2.safetensors'}
    assert ChannelMask.load(many / 'act' / 'mask-2.safetensors') == b
    assert card.data.base_model == [*LAB, 'lab/swahili']
    start = '# many, transfer (no command line recorded): target lab/maths-en, rule mean, donor lab/base, lam 1.0'
    assert bash(card)[-1].startswith(start)
    assert 'donor lab/swahili, lam 0.5' in bash(card)[-1]
    assert prepare(tmp_path / 'many', mask=[a, b]).mask == a | b
    assert 'Where several donors claim a channel, the rule is `mean`' in card.text
    assert '`science-es` | 0.02 | `raw` | 0.5' in card.text


@pytest.mark.parametrize(
    'line, words',
    [
        ('act_publish', 'needs --model'),
        ('act_publish --model {t}/moved', 'needs --out, or --push'),
        ('act_publish --model {t}/none --out {o}/x', 'neither a folder nor a file'),
        ('act_publish --model {t}/moved --out {t}/moved', 'exists already'),
        ('act_publish --model lab/base --out {o}/x', 'neither a folder nor a file'),
        ('act_publish --model {b} --out {o}/x', 'neither act_transfer.json nor act_finetune.json'),
        ('act_publish --model {t}/m.safetensors --out {o}/x', 'not a usable delta'),
        ('act_publish --model {t}/moved --mask {t}/none --out {o}/x', 'no mask file'),
        ('act_publish --model {t}/moved --scores {t}/m.safetensors --out {o}/x', 'evaluation result'),
        ('act_publish --model {t}/moved --license MIT! --out {o}/x', "hub's name for it"),
        ('act_publish --model {t}/moved --out {o}/x --push nobody', 'give OWNER/NAME'),
        ('act_publish --model {t}/moved --out {o}/x --push me/x', 'HF_HUB_OFFLINE is set'),
        ('act_publish --model {t}/moved --push me/x', 'is not a folder that act_publish wrote'),
        ('act_publish --model {o}/no.gguf --out {o}/x', 'no file'),
        ('act_publish --model {o}/bad.gguf --out {o}/x', 'not a readable GGUF'),
        (
            'act_transfer --target {o}/bad.gguf --donor lab/base --mask {t}/m.safetensors --out {o}/x',
            'not a readable GGUF',
        ),
    ],
)
def test_wrong_inputs_are_one_line(made, run, tmp_path, line, words, monkeypatch):
    monkeypatch.setenv('ACT_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'bad.gguf').write_bytes(b'GGUF\x03\0\0\0garbage')
    code, out, err = run(line.format(t=made[0], o=tmp_path, b=resolve('lab/base')))
    assert code == 2
    assert err.startswith('error: ')
    assert err.count('\n') == 1
    assert words in err
    assert not (tmp_path / 'x').exists()


def test_an_output_that_is_there_is_refused_before_anything_is_read(out, monkeypatch):
    monkeypatch.setattr(P, 'prepare', lambda *a, **k: 1 / 0)
    with pytest.raises(ActError, match='exists already'):
        publish('nowhere', out)


def test_a_dry_run_shows_the_card_and_leaves_nothing(made, run, tmp_path):
    code, out, _ = run(
        f'act_publish --model {made[0]}/moved --mask {made[0]}/m.safetensors --out {tmp_path}/o/x --dry_run'
    )
    assert code == 0
    assert f'{tmp_path}/o/x (about ' in out
    assert 'base_model:\n- lab/maths-en' in out
    assert '## How to reproduce' in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'break_',
    [
        lambda m: m.setattr(P, '_write_picture', lambda *a: 1 / 0),
        lambda m: m.setattr(Card, 'save', lambda *a: (_ for _ in ()).throw(OSError(28, 'No space left on device'))),
        lambda m: m.setattr('act.writer.all_finite', lambda t: False),
    ],
)
def test_a_write_that_fails_leaves_nothing(made, tmp_path, monkeypatch, break_):
    with monkeypatch.context() as m:
        break_(m)
        with pytest.raises((ActError, ZeroDivisionError)):
            publish(made[2], tmp_path / 'x', mask=made[1])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / '.x.partial' / 'out').mkdir(parents=True)
    (tmp_path / '.x.partial' / 'out' / 'model.safetensors').write_bytes(b'half, of a killed run')
    assert (publish(made[2], tmp_path / 'x') / 'model.safetensors').stat().st_size > 1e6
    assert [f.name for f in tmp_path.iterdir()] == ['x']


# the hub
class Hub:
    "The part of the hub's HTTP interface that an upload needs, in a thread; `.files` have arrived, `.calls` were made."

    def __init__(self):
        self.files, self.blobs, self.calls, self.repos, self.fail, self.lfs = (
            {},
            {},
            [],
            {},
            {},
            ('.safetensors', '.png'),
        )
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *a):
                pass

            def answer(self, obj=None, code=200):
                data = json.dumps(obj if obj is not None else {}).encode()
                self.send_response(code)
                self.send_header('Content-Type', 'application/json')
                self.send_header('Content-Length', str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do(self):
                body = (
                    self.rfile.read(int(self.headers.get('Content-Length') or 0))
                    if 'chunked' not in self.headers.get('Transfer-Encoding', '')
                    else self.chunks()
                )
                path = self.path.split('?')[0]
                hub.calls.append((self.command, path, self.headers.get('Authorization')))
                for part, code in hub.fail.items():
                    if part in path:
                        return self.answer(dict(error='no'), code)
                self.answer(*hub.do(self.command, path, body))

            def chunks(self):
                out = b''
                while n := int(self.rfile.readline(), 16):
                    out += self.rfile.read(n)
                    self.rfile.readline()
                self.rfile.readline()
                return out

            do_GET = do_POST = do_PUT = do_HEAD = do

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def do(self, method, path, body):
        if path == '/api/repos/create':
            d = json.loads(body)
            repo = f"{d['organization']}/{d['name']}"
            if repo in self.repos:
                return dict(url=f'{self.url}/{repo}', error='You already created this model repo'), 409
            self.repos[repo] = dict(private=d.get('visibility') == 'private' or bool(d.get('private')), files=[])
            return (dict(url=f'{self.url}/{repo}'),)
        if path == '/api/validate-yaml':
            return (dict(errors=[], warnings=[]),)
        if '/preupload/' in path:
            return (
                dict(
                    files=[
                        dict(
                            path=f['path'],
                            uploadMode='lfs' if f['path'].endswith(self.lfs) else 'regular',
                            shouldIgnore=False,
                            oid=None,
                        )
                        for f in json.loads(body)['files']
                    ]
                ),
            )
        if path.endswith('/info/lfs/objects/batch'):
            return (
                dict(
                    transfer='basic',
                    objects=[
                        dict(
                            oid=o['oid'],
                            size=o['size'],
                            authenticated=True,
                            actions=dict(
                                upload=dict(href=f"{self.url}/blob/{o['oid']}"), verify=dict(href=f'{self.url}/verify')
                            ),
                        )
                        for o in json.loads(body)['objects']
                    ],
                ),
            )
        if path.startswith('/blob/'):
            self.blobs[path[6:]] = body
            return ({},)
        if path == '/verify':
            return ({},)
        if '/commit/' in path:
            for line in map(json.loads, body.decode().splitlines()):
                v = line['value']
                if line['key'] == 'file':
                    self.files[v['path']] = base64.b64decode(v['content'])
                elif line['key'] == 'lfsFile':
                    self.files[v['path']] = self.blobs[v['oid']]
            repo = path.split('/api/models/')[1].split('/commit/')[0]
            return (dict(commitUrl=f'{self.url}/{repo}/commit/1', commitOid='1', pullRequestUrl=None, success=True),)
        if path.startswith('/api/models/'):
            repo = '/'.join(path.split('/')[3:5])
            if repo not in self.repos:
                return dict(error='Repository not found'), 404
            return (
                dict(
                    id=repo,
                    private=self.repos[repo]['private'],
                    sha='0' * 40,
                    siblings=[dict(rfilename=f) for f in self.repos[repo]['files']],
                    tags=[],
                    downloads=0,
                    likes=0,
                ),
            )
        return dict(error=path), 404


@pytest.fixture
def hub(monkeypatch):
    h = Hub()
    for k, v in dict(HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True).items():
        monkeypatch.setattr(constants, k, v)
    monkeypatch.setattr(P, 'hub_is_off', lambda: False)
    yield h
    h.server.shutdown()


@pytest.mark.parametrize('private', [False, True])
def test_what_arrives_is_the_folder_to_the_byte(hub, out, private):
    assert push(out, 'me/science', private, hub.url, 'hf_secret') == f'{hub.url}/me/science/commit/1'
    assert hub.files == files(out)
    assert hub.repos['me/science']['private'] == private
    assert set(hub.blobs) == {
        hashlib.sha256(files(out)[f]).hexdigest() for f in files(out) if f.endswith(('.safetensors', '.png'))
    }
    assert all(a == 'Bearer hf_secret' for m, p, a in hub.calls if p.startswith('/api/'))
    assert yaml.safe_load(hub.files['README.md'].decode().split('---')[1])['license'] == 'apache-2.0'
    hub.repos['me/science']['files'] = list(hub.files)
    push(out, 'me/science', private, hub.url, 'hf_secret')  # again, over itself


@pytest.mark.parametrize(
    'set_up, why',
    [
        (lambda h, m: h.fail.update({'/api/repos/create': 401}), 'the token is not accepted'),
        (lambda h, m: h.fail.update({'/api/repos/create': 403}), 'no right to write there'),
        (lambda h, m: h.fail.update({'/commit/': 403}), 'no right to write there'),
        (lambda h, m: h.fail.update({'/info/lfs': 500}), 'the hub answers 500'),
        (
            lambda h, m: h.repos.update({'me/x': dict(private=False, files=['pytorch_model.bin'])}),
            'holds other weights .pytorch_model.bin',
        ),
        (lambda h, m: (h.server.shutdown(), h.server.server_close()), 'cannot be reached'),
        (lambda h, m: m.setattr(P, 'get_token', lambda: None), 'no token for the hub'),
        (lambda h, m: m.setattr(P, 'hub_is_off', lambda: True), 'HF_HUB_OFFLINE is set'),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, out, set_up, why, monkeypatch):
    monkeypatch.setattr(P, 'get_token', lambda: 'hf_secret')
    monkeypatch.setattr('time.sleep', lambda s: None)  # between tries
    set_up(hub, monkeypatch)
    with pytest.raises(ActError, match=why) as e:
        push(out, 'me/x', endpoint=hub.url, token=None if 'token' in why and 'no ' in why[:3] else 'hf_secret')
    assert '\n' not in str(e.value)
    assert 'hf_secret' not in str(e.value)
    assert not hub.files


def test_private_stays_private(hub, out):
    hub.repos['me/x'] = dict(private=False, files=[])
    with pytest.raises(ActError, match='is public'):
        push(out, 'me/x', True, hub.url, 't')
    assert not hub.files


@pytest.mark.slow
def test_the_command_writes_and_pushes(hub, made, tmp_path):
    bin, env = (
        Path(sys.executable).parent,
        dict(
            os.environ,
            HF_ENDPOINT=hub.url,
            HF_HUB_OFFLINE='0',
            HF_HUB_DISABLE_XET='1',
            HF_TOKEN='hf_secret',
            OMP_NUM_THREADS='1',
        ),
    )
    r = subprocess.run(
        [
            bin / 'act_publish',
            '--model',
            made[0] / 'moved',
            '--mask',
            made[0] / 'm.safetensors',
            '--out',
            tmp_path / 'o',
            '--push',
            'me/science',
        ],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert r.returncode == 0
    assert f'pushed: {hub.url}/me/science/commit/1' in r.stdout
    assert 'hf_secret' not in r.stdout + r.stderr
    assert hub.files == files(tmp_path / 'o')
    assert "from_pretrained('me/science')" in hub.files['README.md'].decode()


def test_a_published_folder_is_pushed_as_it_is(hub, out, run, monkeypatch):
    monkeypatch.setattr(P, 'get_token', lambda: 'hf_secret')
    monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
    code, text, _ = run(f'act_publish --model {out} --push me/again --dry_run')
    assert code == 0
    assert 'work: push to me/again' in text
    assert not hub.calls
    code, text, err = run(f'act_publish --model {out} --push me/again')
    assert code == 0
    assert 'pushed: ' in text
    assert hub.files == files(out)


# GGUF in, safetensors out
gguf = pytest.importorskip('gguf')


def write_gguf(path, model, tok, kind='F32', license=None, leave_out=()):
    "A model of the Llama or Qwen2 architecture as a GGUF file, as llama.cpp's converter writes it."
    c, w = model.config, gguf.GGUFWriter(path, model.config.model_type)
    w.add_name('tiny')
    if license:
        w.add_license(license)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_vocab_size(c.vocab_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters['rope_theta'])
    d = json.loads(tok.backend_tokenizer.to_str())['model']
    tokens = sorted(d['vocab'], key=d['vocab'].get)
    w.add_tokenizer_model('gpt2')
    w.add_tokenizer_pre('qwen2')
    w.add_token_list(tokens)
    w.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    w.add_token_merges([' '.join(m) for m in d['merges']])
    w.add_pad_token_id(0)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[c.model_type.upper()], c.num_hidden_layers)
    for n, t in model.state_dict().items():
        if n in leave_out or n == 'lm_head.weight' and c.tie_word_embeddings:
            continue
        x = t.float().numpy()
        if c.model_type == 'llama' and ('q_proj' in n or 'k_proj' in n):  # both halves of a rotated head interleaved
            h = c.num_attention_heads if 'q_proj' in n else c.num_key_value_heads
            x = x.reshape(h, 2, x.shape[0] // h // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        q = gguf.GGMLQuantizationType[kind if x.ndim == 2 else 'F32']
        w.add_tensor(names.get_name(n, ('.weight', '.bias')), gguf.quants.quantize(x, q), raw_dtype=q)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


IDS = torch.arange(3, 43)[None] * 7 % 300


@pytest.mark.parametrize('family', ['llama2', 'smollm2', 'qwen2', 'qwen2_untied'])
@pytest.mark.parametrize('kind, dtype', [('F32', torch.float32), ('F16', torch.float16), ('BF16', torch.bfloat16)])
def test_a_gguf_file_becomes_the_model_it_was(tmp_path, tokenizer, family, kind, dtype):
    model, wide = tiny_model(family, dtype=dtype), tiny_model(family)
    wide.load_state_dict(model.state_dict())
    out = from_gguf(write_gguf(tmp_path / 'm.gguf', model, tokenizer, kind), tmp_path / 'out')
    net, tok = load_model(out)
    assert net.dtype == dtype
    assert net.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert tok('two plus 二')['input_ids'] == tokenizer('two plus 二')['input_ids']
    assert weight_hash(net) == weight_hash(model)
    assert torch.allclose(load_model(out, dtype='float32')[0](IDS).logits, wide(IDS).logits, atol=1e-5)
    assert not hasattr(net.config, 'quantization_config')
    assert not list(out.glob('*.bin'))
    assert (
        json.loads((out / 'act_gguf.json').read_text())['sha256']
        == hashlib.sha256((tmp_path / 'm.gguf').read_bytes()).hexdigest()
    )


def test_quantised_weights_are_unpacked_to_bfloat16(tmp_path, tokenizer):
    from conftest import tiny_config

    c = tiny_config('smollm2')
    c.hidden_size, c.intermediate_size, c.head_dim = 32, 64, 8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(c).eval()
    out = from_gguf(write_gguf(tmp_path / 'm.gguf', model, tokenizer, 'Q8_0'), tmp_path / 'out')
    net = load_model(out)[0]
    w, q = model.model.layers[1].mlp.down_proj.weight, net.model.layers[1].mlp.down_proj.weight
    assert net.dtype == torch.bfloat16
    assert 0 < (w - q.float()).abs().max() < w.abs().max() / 60
    assert net.lm_head.weight is net.model.embed_tokens.weight


def test_a_gguf_file_is_a_model_everywhere(tmp_path, tokenizer, run, monkeypatch):
    monkeypatch.setenv('ACT_CACHE', str(tmp_path / 'cache'))
    t, d = (
        write_gguf(tmp_path / f'{n}.gguf', tiny_model('llama3', s), tokenizer, license=l)
        for n, s, l in (('t', 0, 'mit'), ('d', 1, 'mit'))
    )
    (tmp_path / 'q.jsonl').write_text(
        '\n'.join(json.dumps(dict(prompt=f'two plus {i}', answer=f' is {i + 2}')) for i in range(4))
    )
    code, text, _ = run(
        f'act_localize --target {t} --donor {d} --ability {tmp_path}/q.jsonl --out {tmp_path}/s --dry_run'
    )
    assert code == 0
    assert 'unpack t.gguf' in text
    assert not (tmp_path / 'cache').exists()
    assert run(f'act_localize --target {t} --donor {d} --ability {tmp_path}/q.jsonl --out {tmp_path}/s')[0] == 0
    assert run(f'act_mask --scores {tmp_path}/s --p 0.2 --out {tmp_path}/m')[0] == 0
    assert run(f'act_transfer --target {t} --donor {d} --mask {tmp_path}/m --out {tmp_path}/moved')[0] == 0
    want = transfer(tiny_model('llama3', 0), tiny_model('llama3', 1), ChannelMask.load(tmp_path / 'm'))
    assert torch.equal(load_model(tmp_path / 'moved')[0](IDS).logits, want(IDS).logits)
    pub = prepare(tmp_path / 'moved', mask=tmp_path / 'm')
    assert pub.licence.id == 'mit'
    assert dict(pub.licences)['t.gguf'].said == 'general.license of t.gguf'
    assert str(tmp_path) not in str(pub.card())
    assert len(list((tmp_path / 'cache' / 'gguf').iterdir())) == 2
    assert resolve(t) == resolve(str(t))
    before = resolve(t)
    size = t.stat().st_size
    write_gguf(t, tiny_model('llama3', 2), tokenizer, license='mit')
    assert t.stat().st_size == size
    assert resolve(t) != before
    assert weight_hash(t) == weight_hash(tiny_model('llama3', 2))


def test_a_gguf_file_is_published_as_safetensors(tmp_path, tokenizer, run, monkeypatch):
    monkeypatch.setenv('ACT_CACHE', str(tmp_path / 'cache'))
    model = tiny_model('qwen2')
    f = write_gguf(tmp_path / 'm.gguf', model, tokenizer, license='apache-2.0')
    code, text, _ = run(f'act_publish --model {f} --out {tmp_path}/o --dry_run')
    assert code == 0
    assert 'A GGUF file, `m.gguf`' in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ['m.gguf']
    assert run(f'act_publish --model {f} --out {tmp_path}/o')[0] == 0
    with quiet():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / 'o')(IDS).logits, model(IDS).logits)
    card = Card.load(tmp_path / 'o' / 'README.md')
    assert card.data.license == 'apache-2.0'
    assert card.data.base_model is None
    assert bash(card) == ['act_publish --model m.gguf --out m']
    assert hashlib.sha256(f.read_bytes()).hexdigest() in card.text
    assert str(tmp_path) not in card.text
    assert licence_of(tmp_path / 'o').id == 'apache-2.0'
    assert [s.kind for s in history(tmp_path / 'o')] == ['gguf']


def test_gguf_files_that_are_not_whole(tmp_path, tokenizer):
    f = write_gguf(
        tmp_path / 'm.gguf', tiny_model('qwen2'), tokenizer, leave_out=('model.layers.1.mlp.up_proj.weight',)
    )
    with pytest.raises(ActError, match='lacks model.layers.1.mlp.up_proj.weight'):
        from_gguf(f, tmp_path / 'o')
    f.write_bytes(write_gguf(tmp_path / 'n.gguf', tiny_model('qwen2'), tokenizer).read_bytes()[:-3000])
    with pytest.raises(ActError, match='not a readable GGUF file'):
        from_gguf(f, tmp_path / 'o')
    w = gguf.GGUFWriter(f, 'noarch')
    w.add_name('x')
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(ActError, match='not a model that transformers can read'):
        from_gguf(f, tmp_path / 'o')
    assert not (tmp_path / 'o').exists()
