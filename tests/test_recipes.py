"Recipes: what is wrong is named before anything runs; a killed run goes on; a change redoes only what it touches."

import json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest
from filelock import FileLock
from act.sources import load_ability
from act.kit.errors import ActError
from act.loading import channels_of
from act.studies.recipe_plan import plan, shape_of
from act.studies.recipes import read_recipe, recipe_file, recipe_names
from act.studies.stages import Store, run_recipe
from act.studies.recovery import Recovery

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')


def tiny(tmp_path, old=None, new=None):
    text = (
        recipe_file('lab-recover')
        .read_text()
        .replace('n: 40', 'n: 6')
        .replace('items: 32', 'items: 8')
        .replace('steps: 10', 'steps: 1')
        .replace('ps: [0.1, 0.3]', 'ps: [0.1]')
    )
    if old:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / 'tiny.yaml').write_text(text)
    return tmp_path / 'tiny.yaml'


@pytest.mark.parametrize(
    'old,new,message',
    [
        ('target: lab/maths-en', 'traget: lab/maths-en', "unknown entry 'traget'"),
        ('kind: recover', 'kind: improve', 'choose recover or merge'),
        ('  donor: lab/base\n', '', "lacks 'donor'"),
        ('ps: [0.1]', 'ps: [1.5]', 'at most 1'),
        ('ps: [0.1]', 'ps: 0.1', 'a list of'),
        ('seeds: [0]', 'seeds: 3', 'a list of whole numbers'),
        ('seeds: [0]', 'rows: [ACT]', "rows lacks 'ACT"),
        ('seeds: [0]', 'rows: [ACT, magic]', "no row is called 'magic'"),
        ('donor: lab/base', 'donor: train/base', 'not under train'),
        ('seeds: [0]', 'seeds: [0', 'not YAML'),
        ('seeds: [0]', 'train: {m: {model: lab/base}}', "train: m lacks 'abilities'"),
        ('seeds: [0]', 'train: {m: {model: lab/base, abilities: [lab/science-en], stepz: 3}}', "unknown entry 'stepz'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, message):
    with pytest.raises(ActError, match=message):
        read_recipe(tiny(tmp_path, old, new))


def test_every_recipe_reads_and_every_shape_resolves():
    assert len(recipe_names()) == 9
    for name in recipe_names():
        r = read_recipe(name)
        if '7b' in name:
            p = plan(r)
            assert (
                p.models.parameters.min() > 6e9
                and set(p.models.origin) == {'recipe'}
                and p.moved.channels.is_monotonic_increasing
            )
            assert not [o for o in p.problems if 'ACT_DATA' not in o]  # only data may be out of reach here


def test_a_plan_counts_what_a_run_does(tmp_path):
    r = read_recipe(tiny(tmp_path))
    p = plan(r)
    assert not p.problems and 'Everything resolves' in repr(p) and '<table' in p._repr_html_()
    rec = run_recipe(r, tmp_path / 'run', progress=False)
    assert rec.meta['stages_made'] == p.work.times.sum() + 2  # and two weight hashes
    total = channels_of('lab/maths-en').total
    assert p.kinds.channels.sum() == total and list(p.moved.channels) == [total // 10]


def test_a_plan_names_what_does_not_resolve(tmp_path):
    p = plan(read_recipe(tiny(tmp_path, 'recovered: [lab/science-zh]', 'recovered: [lab/poetry-zh, mgsm/sw]')))
    assert len(p.problems) == 8 and any('poetry' in o for o in p.problems) and any('ACT_DATA' in o for o in p.problems)
    p = plan(read_recipe(tiny(tmp_path, 'donor: lab/base', 'donor: nobody/knows')))
    assert len(p.problems) == 1 and 'under shapes' in p.problems[0]


def test_shapes_must_agree_with_the_models_own(tmp_path):
    r = read_recipe(tiny(tmp_path, 'seeds: [0]', 'shapes: {lab/base: {model_type: qwen2, hidden_size: 64}}'))
    with pytest.raises(ActError, match='hidden_size 64, its config.json says 128'):
        shape_of(r, 'lab/base')
    other = (
        'shapes: {nobody/knows: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,'
        ' num_attention_heads: 4, vocab_size: 100}}\nseeds: [0]'
    )
    p = plan(replace(read_recipe(tiny(tmp_path, 'seeds: [0]', other)), case=replace(r.case, donor='nobody/knows')))
    assert any('different channels' in o for o in p.problems)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_table(tmp_path):
    recipe = tiny(tmp_path)
    whole = run_recipe(read_recipe(recipe), tmp_path / 'whole', progress=False)
    run = subprocess.Popen(
        [
            sys.executable,
            '-c',
            (
                'from act.studies.recipes import read_recipe; from act.studies.stages import run_recipe;'
                f' run_recipe(read_recipe({str(recipe)!r}), {str(tmp_path / "run")!r}, progress=False)'
            ),
        ],
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )
    stages = tmp_path / 'run' / 'stages'
    while run.poll() is None and len(list(stages.glob('[!.]*'))) < 9:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = {f.name: f.read_bytes() for f in stages.glob('[!.]*')}
    assert 9 <= len(before) < whole.meta['stages_made'] and not (tmp_path / 'run' / 'report').exists()
    (stages / '.left.json.abc.tmp').write_text('half')
    rec = run_recipe(read_recipe(tmp_path / 'run' / 'recipe.yaml'), tmp_path / 'run', progress=False)
    assert (
        rec.meta['stages_found'] >= len(before) - 2
        and rec.meta['stages_made'] + len(before) == whole.meta['stages_made']
    )
    assert rec.table().equals(whole.table()) and not list(stages.glob('.*.tmp'))
    assert all((stages / n).read_bytes() == b for n, b in before.items())
    assert Recovery.load(tmp_path / 'run' / 'report' / 'result.json').table().equals(whole.table())


@pytest.mark.slow
def test_a_change_redoes_what_it_touches(tmp_path):
    r = read_recipe(tiny(tmp_path))
    run_recipe(r, tmp_path / 'run', progress=False)
    wider = run_recipe(replace(r, case=replace(r.case, others=('lab/science-es',))), tmp_path / 'run', progress=False)
    assert wider.meta['stages_made'] == 2 + len(r.rows)  # the test items changed, the settings' scores did not
    other = run_recipe(
        replace(r, case=replace(r.case, sft=dict(r.case.sft, lr=1e-3))), tmp_path / 'run', progress=False
    )
    assert (
        other.meta['stages_found'] == 2 + 4 + 1 + 2 + 2
    )  # hashes, given models, localisation, and what has no fine-tuning: two settings' scores, two rows


def test_names_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        read_recipe('lab-recover') == read_recipe(recipe_file('lab-recover'))
        and read_recipe('lab-recover').name == 'lab-recover'
    )
    (tmp_path / 'lab-recover').mkdir()  # the run of that name: it is not asked
    assert read_recipe('lab-recover').kind == 'recover'
    for wrong in ('lab-recovery', 'none.yaml', tmp_path, ''):
        with pytest.raises(
            ActError, match='neither the name of a recipe nor a file: choose one of lab-merge, lab-recover, '
        ):
            read_recipe(wrong)


def test_a_file_of_ones_own_is_split_for_every_stage(tmp_path):
    load_ability('lab/science-zh', 'sft', 120).save(tmp_path / 'mine.jsonl')
    path = tiny(tmp_path, 'recovered: [lab/science-zh]', f"recovered: ['{tmp_path}/mine.jsonl']\n")
    path.write_text(path.read_text() + 'rows: [ACT (module-normalised) without SFT, ACT (module-normalised)]\n')
    rec = run_recipe(read_recipe(path), tmp_path / 'run', progress=False)
    assert [*rec.rows] == ['target', 'donor', 'ACT (module-normalised) without SFT', 'ACT (module-normalised)'] and {
        *rec.rows['donor'][0]
    } == {'mine', 'multiplication-en', 'science-en'}


def test_two_runs_do_not_share_a_folder(tmp_path):
    r = read_recipe(tiny(tmp_path))
    (tmp_path / 'run').mkdir()
    with FileLock(tmp_path / 'run' / '.lock'), pytest.raises(ActError, match='another run is working'):
        run_recipe(r, tmp_path / 'run', progress=False)


def test_a_stage_file_that_was_tampered_with_is_refused(tmp_path):
    s = Store(tmp_path)
    s.value('x', dict(a=1), lambda: 5)
    s.path('x', dict(a=1)).write_text('{"value": 6}')
    with pytest.raises(ActError, match='act-stage-1'):
        s.value('x', dict(a=1), lambda: 5)


@pytest.mark.slow
def test_a_recipe_makes_its_own_specialist(tmp_path):
    text = (
        recipe_file('lab-merge')
        .read_text()
        .replace('n: 40', 'n: 6')
        .replace('items: 32', 'items: 8')
        .replace('steps: 10', 'steps: 1')
        .replace('    lab/science-es:', '    train/own:')
    )
    text += 'train: {own: {model: lab/base, abilities: [lab/chemistry-es], steps: 2, lr: 1.0e-4, batch_size: 4}}\n'
    text = text.replace(
        'rows: [ACT, ACT (module-normalised), random masks, task arithmetic (mergekit), TIES (mergekit), joint SFT]',
        'rows: [ACT (module-normalised), task arithmetic (mergekit)]',
    )
    (tmp_path / 'm.yaml').write_text(text)
    r = read_recipe(tmp_path / 'm.yaml')
    assert not plan(r).problems
    rec = run_recipe(r, tmp_path / 'run', progress=False)
    assert {'base', 'maths-en', 'train-own', 'oracle'} < set(rec.rows) and str(tmp_path) not in (
        tmp_path / 'run' / 'report' / 'result.json'
    ).read_text()
    assert run_recipe(r, tmp_path / 'run', progress=False).meta['stages_made'] == 0
    assert {f.name for f in (tmp_path / 'run' / 'report').iterdir()} >= {
        'result.json',
        'table.csv',
        'table.txt',
        'grid.csv',
        'against.csv',
        'rows.svg',
        'rows.png',
    }


@pytest.mark.slow
def test_the_command(tmp_path):
    cli = lambda *a: subprocess.run(
        [
            sys.executable,
            '-c',
            'import sys; from act.commands.studies import act_recipe; sys.exit(act_recipe.main())',
            *map(str, a),
        ],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )
    listed = cli('list').stdout
    assert all(f'{n}\n  ' in listed for n in recipe_names()) and 'a minute on two cores' in listed
    mine = tmp_path / 'my.yaml'
    assert 'dry run' in cli('copy', '--recipe', 'lab-merge', '--out', mine, '--dry_run').stdout and not mine.exists()
    assert (
        cli('copy', '--recipe', 'lab-merge', '--out', mine).returncode == 0
        and mine.read_bytes() == recipe_file('lab-merge').read_bytes()
    )
    again = cli('copy', '--recipe', 'lab-recover', '--out', mine)
    assert again.returncode == 2 and 'exists already' in again.stderr and 'merge' in mine.read_text()
    recipe, out = tiny(tmp_path), tmp_path / 'run'
    dry = cli('run', '--recipe', recipe, '--dry_run')
    assert dry.returncode == 0 and 'Everything resolves' in dry.stdout and not out.exists()
    bad = cli('run', '--recipe', tiny(tmp_path, 'lab/science-zh', 'lab/poetry-zh'), '--dry_run')
    assert bad.returncode == 2 and 'PROBLEM' in bad.stdout and 'problem(s)' in bad.stderr
    assert (
        'holds no run' in cli('resume', '--out', out).stderr
        and 'choose list, copy, run, resume or report' in cli('jump', '--out', out).stderr
    )
    done = cli('run', '--recipe', tiny(tmp_path), '--out', out)
    assert done.returncode == 0 and 'module-normalised' in done.stdout, done.stderr
    assert 'exists already' in cli('run', '--recipe', recipe, '--out', out).stderr
    assert 'module-normalised' in cli('report', '--out', out).stdout
    (out / 'report' / 'result.json').unlink()
    assert 'resume' in cli('report', '--out', out).stdout and cli('resume', '--out', out).returncode == 0


def test_msvamp_and_arc_from_a_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv('ACT_DATA', str(tmp_path))
    for lang in ('sw', 'es'):
        (tmp_path / 'msvamp').mkdir(exist_ok=True)
        (tmp_path / 'arc' / lang).mkdir(parents=True)
        (tmp_path / 'msvamp' / f'{lang}.jsonl').write_text(
            ''.join(json.dumps(dict(m_query=f' {lang} {i}?', response=f'{i}.0')) + '\n' for i in range(60))
        )
        for f, n in dict(train=60, val=9, test=11).items():
            (tmp_path / 'arc' / lang / f'{f}.jsonl').write_text(
                ''.join(
                    json.dumps(
                        dict(
                            id=f'q{i}',
                            instruction=f'{lang}?',
                            option_a='x',
                            option_b='y',
                            option_c='z',
                            option_d=None,
                            answer='B',
                        )
                    )
                    + '\n'
                    for i in range(n)
                    if lang == 'es' or i % 3
                )
            )
    assert load_ability('msvamp/sw')[0].answer == load_ability('msvamp/es')[0].answer and load_ability('msvamp/sw')[
        0
    ].prompt.endswith('?\n')
    arc = {s: load_ability('arc/es', s) for s in ('train', 'localize', 'sft', 'validation', 'test')}
    assert (len(arc['validation']), len(arc['test']), sum(len(arc[s]) for s in ('train', 'localize', 'sft'))) == (
        9,
        11,
        60,
    )
    assert (
        arc['test'][0].choices == ('A. x', 'B. y', 'C. z')
        and arc['test'][0].answer == 'B. y'
        and arc['test'][0].prompt == 'es?\nA. x\nB. y\nC. z\n'
    )
