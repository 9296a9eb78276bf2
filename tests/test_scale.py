"""Scale: known parameter counts; sparse folders that take no space.

Plans count what a transfer reads and changes, to the byte.
"""

import importlib.util, os, sys, pytest, torch
import pandas as pd
from pathlib import Path
from safetensors.torch import load_file, save_file
from act.channels import meta_model, enumerate_channels
from act.checkpoints import Checkpoint
from act.loading import channels_of, load_model, load_tokenizer
from act.kit.errors import ActError
from act.kit.records import write_json
from act.deltas import make_delta
from act.finetune_cost import forward_operations
from act import hooks, localize
from act.masks import random_mask
from act.studies.recipes import read_recipe, recipe_names
from act.commands.tools import act_plan
from act.tools import machine
from act.tools.machine import measure_constants
from act.tools.plan import even_mask, load_constants, plan_localize, plan_transfer, predict
from act.tools.shapes import SHAPES, config_of, layout, sparse_checkpoint
from act.streaming import transfer_checkpoint
from act.transfer import mask_slices
from conftest import FAMILIES, tiny_config, tiny_model


KNOWN = {
    'qwen2.5-0.5b': 494_032_768,
    'qwen2.5-1.5b': 1_543_714_304,
    'qwen2.5-3b': 3_085_938_688,
    'qwen2.5-7b': 7_615_616_512,
    'qwen2.5-14b': 14_770_033_664,
    'qwen2.5-32b': 32_763_876_352,
    'qwen2.5-72b': 72_706_203_648,
    'llama-2-7b': 6_738_415_616,
    'llama-2-13b': 13_015_864_320,
    'llama-2-70b': 68_976_648_192,
    'llama-3.1-8b': 8_030_261_248,
    'llama-3.1-70b': 70_553_706_496,
}
TINY = dict(
    model_type='qwen2',
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    tie_word_embeddings=True,
)
FAST = {
    k: dict(median=v, least=v / 2, most=2 * v, runs=3)
    for k, v in dict(copy=1e9, read=2e9, rows=1e4, start=1.0, start_localize=2.0, overhead=1e7).items()
}
CONSTANTS = dict(
    format='act-scale-1',
    memory=32e9,
    **FAST,
    localize={d: {t: FAST['copy'] for t in ('bfloat16', 'float32')} for d in ('cpu', 'cuda')},
    machine=dict(cpu='a cpu', cores=2, gpu=None),
)


def filled(folder, source, value, **kw):
    "A checkpoint whose every number is `value`."
    sparse_checkpoint(source, folder, **kw)
    for f in Checkpoint(folder).files:
        save_file(
            {k: torch.full_like(v, value) for k, v in load_file(folder / f).items()},
            folder / f,
            metadata=dict(format='pt'),
        )
    return folder


def some(folder, p=0.3, seed=0, tied='embedding'):
    return random_mask(even_mask(channels_of(folder, tied), p), seed)


def delta_size(a, b, mask, lam=1.0):
    raw = make_delta(a, b, mask, lam, a.parent / 'm.delta').read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[:8], 'little')


def differing(a, b):
    return sum(
        sum(x != y for x, y in zip((a / f).read_bytes(), (b / f).read_bytes(), strict=True))
        for f in Checkpoint(a).files
    )


def test_known_parameter_counts():
    assert {k: sum(p.numel() for p in meta_model(config_of(k)).parameters()) for k in SHAPES} == KNOWN
    assert config_of('QWEN2.5-7B').hidden_size == 3584
    assert config_of('lab/base').hidden_size == 128


def test_recipes_note_the_same_shapes():
    noted = [(hub, s) for n in recipe_names() for hub, s in read_recipe(n).shapes.items()]
    assert len(noted) >= 2
    for hub, entries in noted:
        assert SHAPES[hub.split('/')[-1].lower().removesuffix('-hf')] == entries


@pytest.mark.parametrize('what', ['qwen9', 'no/such/folder', {'model_type': 'none'}])
def test_a_shape_that_nobody_knows(what):
    with pytest.raises(ActError, match='one of qwen2.5-0.5b'):
        config_of(what)


def test_sparse_folders_take_no_place_and_read_as_zeros(tmp_path):
    folder = sparse_checkpoint('llama-2-70b', tmp_path / 'm')
    ck = Checkpoint(folder)
    assert ck.nbytes == 2 * KNOWN['llama-2-70b']
    assert len(ck.files) == len(layout('llama-2-70b')) > 20
    assert all((folder / f).stat().st_size < 5.1e9 for f in ck.files)
    assert sum(f.stat().st_blocks * 512 for f in folder.iterdir()) < 2e6
    assert not ck.read('lm_head.weight', 31990).any()
    assert ck.read('model.layers.79.mlp.up_proj.weight', 7, 9).shape == (2, 8192)
    assert channels_of(folder).total == 80 * (5 * 8192 + 2 * 1024 + 2 * 28672) + 2 * 8192 + 32000
    with pytest.raises(ActError, match='exists already'):
        sparse_checkpoint(TINY, folder)


def test_nothing_is_left_of_a_checkpoint_that_fails(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('act.tools.shapes.write_sparse', full)
    with pytest.raises(ActError, match='No space left'):
        sparse_checkpoint(TINY, tmp_path / 'm')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_a_small_one_loads_as_a_model(dtype, tmp_path):
    net, tok = load_model(
        sparse_checkpoint(
            TINY | dict(vocab_size=len(load_tokenizer('lab/base'))), tmp_path / 'm', dtype, shard_bytes=9e3, seed=1
        )
    )
    assert len(Checkpoint(tmp_path / 'm').files) > 1
    assert str(net.dtype) == f'torch.{dtype}'
    assert net.model.embed_tokens.weight.abs().sum() > 0
    assert torch.isfinite(net(**tok('two and two', return_tensors='pt')).logits).all()


@pytest.mark.parametrize('family', list(FAMILIES))
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_layout_is_that_of_a_saved_model(family, dtype, tmp_path):
    tiny_model(family, dtype=getattr(torch, dtype)).save_pretrained(tmp_path / 'real')
    sparse_checkpoint(tiny_config(family), tmp_path / 'sparse', dtype)
    x, y = ({k: (t.dtype, t.shape) for k, t in Checkpoint(tmp_path / n).tensors.items()} for n in ('real', 'sparse'))
    assert x == y
    assert channels_of(tmp_path / 'real') == channels_of(tmp_path / 'sparse')


class Counted:
    "Bytes that are read from files of a folder."

    def __init__(self, monkeypatch):
        self.read, self.calls, real = [], [], os.preadv
        monkeypatch.setattr(os, 'preadv', lambda fd, bufs, at: self.add(fd, real(fd, bufs, at)))

    def add(self, fd, n):
        self.read.append((os.readlink(f'/proc/self/fd/{fd}'), n))
        return n

    def of(self, folder):
        return sum(n for f, n in self.read if f.startswith(f'{folder}/'))

    def times(self, folder):
        return sum(f.startswith(f'{folder}/') for f, _ in self.read)


@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='counts reads through /proc')
@pytest.mark.parametrize('tie,tied', [(True, 'embedding'), (True, 'lm_head'), (False, 'embedding')])
@pytest.mark.parametrize('p', [0.05, 0.3, 1.0])
def test_a_plan_counts_what_a_transfer_reads_and_changes(tie, tied, p, tmp_path, monkeypatch):
    shape = TINY | dict(tie_word_embeddings=tie)
    a, b = filled(tmp_path / 'a', shape, 1.0, shard_bytes=9e3), filled(tmp_path / 'b', shape, 2.0)
    mask = some(a, p, tied=tied)
    plan = plan_transfer(a, b, mask)
    seen = Counted(monkeypatch)
    out = transfer_checkpoint(a, b, mask, out=tmp_path / 'out')
    changed = [
        k for k, t in Checkpoint(a).tensors.items() if not torch.equal(Checkpoint(a).read(k), Checkpoint(out).read(k))
    ]
    reads = plan.reads[str(b)]
    assert differing(a, out) == plan.moved  # 1. and 2. differ in both bytes
    assert len(changed) == plan.changed
    assert sum(t.end - t.start for k, t in Checkpoint(a).tensors.items() if k not in changed) == plan.copied
    assert seen.of(b) == reads['rows'] + reads['blocks']
    assert seen.times(b) == reads['runs'] + (reads['blocks'] > 0)
    assert plan.nbytes == Checkpoint(out).nbytes
    assert plan.out == sum((out / f).stat().st_size for f in Checkpoint(out).files)
    assert plan.files == len(Checkpoint(out).files)
    assert plan.channels == mask.count
    assert delta_size(a, b, mask) == plan.delta


def test_a_stored_copy_of_tied_weights_moves_too_but_counts_once(tmp_path):
    a, b = (filled(tmp_path / n, TINY, v) for n, v in (('a', 1.0), ('b', 2.0)))
    for f in (a, b):
        t = load_file(f / 'model.safetensors')
        save_file(
            {**t, 'lm_head.weight': t['model.embed_tokens.weight'].clone()},
            f / 'model.safetensors',
            metadata=dict(format='pt'),
        )
    mask = some(a)
    plan, out = plan_transfer(a, b, mask), transfer_checkpoint(a, b, mask, out=tmp_path / 'out')
    assert (
        differing(a, out)
        == plan.moved
        == plan.delta - mask.total - 64 * len(mask_slices(mask)) + int(mask['model.embed_tokens'].sum()) * 300 * 2
    )
    assert delta_size(a, b, mask) == plan.delta


def test_several_donors(tmp_path):
    a, b, c = (filled(tmp_path / n, TINY, v) for n, v in (('a', 1.0), ('b', 2.0), ('c', 3.0)))
    masks = [some(a, 0.2, i) for i in (1, 2)]
    plan = plan_transfer(a, [b, c], masks, [1.0, 0.5])
    out = transfer_checkpoint(a, [b, c], masks, [1.0, 0.5], tmp_path / 'out')
    numbers = sum(int((Checkpoint(a).read(k) != Checkpoint(out).read(k)).sum()) for k in Checkpoint(a).tensors)
    assert plan.channels == (masks[0] | masks[1]).count
    assert plan.moved == 2 * numbers
    assert set(plan.reads) == {str(b), str(c)}
    assert (
        plan_transfer(a, b, masks).reads[str(b)]['rows']
        == plan_transfer(a, b, masks[0] | masks[1]).reads[str(b)]['rows']
    )
    still = plan_transfer(a, [b, c], masks, [1.0, 0.0])
    assert (
        delta_size(a, [b, c], masks, [1.0, 0.0])
        == still.delta
        == plan.delta
        == delta_size(a, [b, c], masks, [1.0, 0.5])
    )
    assert still.moved == plan_transfer(a, b, masks[0]).moved
    assert still.reads == plan.reads


def test_what_does_not_fit_is_refused(tmp_path):
    a, b = sparse_checkpoint(TINY, tmp_path / 'a'), sparse_checkpoint(TINY | dict(num_hidden_layers=3), tmp_path / 'b')
    with pytest.raises(ActError, match='num_hidden_layers'):
        plan_transfer(a, b, some(a))
    with pytest.raises(ActError, match='does not fit'):
        plan_transfer(a, sparse_checkpoint(TINY, tmp_path / 'c'), some(b))


def test_the_shape_alone_gives_the_plan_of_the_folders(tmp_path):
    a, b = (sparse_checkpoint(TINY, tmp_path / n) for n in 'ab')
    plan, row = plan_transfer(a, b, even_mask(channels_of(a), 0.25), 0.5), predict(TINY, CONSTANTS, p=0.25)
    assert row['delta_gb'] == plan.delta / 1e9
    assert row['checkpoint_gb'] == plan.nbytes / 1e9
    assert row['transfer_s'] == plan.seconds(CONSTANTS)
    assert row['disk_gb'] == 3 * plan.out / 1e9


def test_seconds_follow_from_the_constants(tmp_path):
    a, b = (sparse_checkpoint(TINY, tmp_path / n) for n in 'ab')
    plan = plan_transfer(a, b, some(a))
    r = plan.reads[str(b)]
    assert plan.seconds(CONSTANTS) == pytest.approx(
        1 + plan.nbytes / 1e9 + (r['rows'] + r['blocks']) / 2e9 + r['runs'] / 1e4
    )
    assert plan.seconds(CONSTANTS, 'least') > plan.seconds(CONSTANTS) > plan.seconds(CONSTANTS, 'most') > 1


@pytest.mark.parametrize('family', list(FAMILIES))
def test_localising_counts_channels_and_operations(family):
    config, net = tiny_config(family), tiny_model(family)
    plan = plan_localize(config, tokens=80, answer_tokens=20, length=10, dtype='float32')
    linear = [
        m
        for m in net.modules()
        if isinstance(m, torch.nn.Linear) and (m is not net.lm_head or not config.tie_word_embeddings)
    ]
    counted = sum(m.weight.numel() for m in linear) * 2 * 2 * 80
    wide = config.num_attention_heads * (getattr(config, 'head_dim', None) or 4)
    assert (
        counted <= plan.flops - 2 * 4 * 2 * wide * 10 * 80 <= 1.1 * counted
    )  # biases and norms are counted as if they were multiplied
    assert plan.channels == enumerate_channels(config).total
    assert plan.spill == 4 * 20 * plan.channels
    assert plan.weights == 4 * sum(p.numel() for p in net.parameters())
    assert plan.seconds(CONSTANTS) == pytest.approx(2 + plan.flops / 1e9 + 2 * plan.weights / 2e9)
    assert plan.seconds(CONSTANTS, hold='one') == pytest.approx(plan.seconds(CONSTANTS) + plan.spill * 1.5e-9)
    assert plan.one_at_a_time < plan.side_by_side
    assert plan_localize(config, 80, 20, 10).weights == plan.weights // 2


@pytest.mark.parametrize('hold', ['both', 'one'])
def test_what_is_kept_and_what_waits_is_what_localising_keeps(hold, monkeypatch):
    ability, counts = machine.items_of_200(load_tokenizer('lab/base'), 4)
    seen = dict(subtract_rows=[], save_file=[])

    def noted(name, real):
        def run(store, *args, **kwargs):
            seen[name].append(sum(v.nbytes for v in store.values()))
            return real(store, *args, **kwargs)

        return run

    for name in seen:
        monkeypatch.setattr(hooks, name, noted(name, getattr(hooks, name)))
    localize('lab/maths-en', 'lab/base', ability, hold=hold, batch_tokens=4096, progress=False)
    plan = plan_localize('lab/base', **counts)
    assert max(seen['subtract_rows']) == plan.kept == plan.spill
    assert sum(seen['save_file']) == (plan.spill if hold == 'one' else 0)


@pytest.fixture(scope='module')
def table():
    "What `predict` says of every shape."
    return pd.DataFrame([dict(model=k, **predict(k, CONSTANTS)) for k in SHAPES]).set_index('model')


def test_parameters_of_every_shape(table):
    assert table.parameters.to_dict() == KNOWN


@pytest.mark.parametrize('work', ['localize', 'evaluate', 'finetune'])
def test_seconds_for_every_device_that_was_measured_and_for_no_other(work, table):
    assert {f'{work}_s_cpu', f'{work}_s_cuda'} <= set(table)
    assert f'{work}_s_cuda' not in predict(TINY, {**CONSTANTS, 'localize': {'cpu': CONSTANTS['localize']['cpu']}})


def test_bytes_of_every_shape(table):
    assert table.loc['qwen2.5-7b', 'checkpoint_gb'] == 2 * KNOWN['qwen2.5-7b'] / 1e9
    assert (table.delta_gb / table.checkpoint_gb).between(0.049, 0.051).all()
    assert (table.transfer_peak_mb < 100).all()
    assert (table.one_at_a_time_gb < table.side_by_side_gb).all()


def test_what_fits(table):
    assert table.loc['llama-2-70b', 'fits'] == 'neither'
    assert table.loc['qwen2.5-0.5b', 'fits'] == 'side by side'


def test_evaluating_is_a_forward_pass_and_a_training_step_three():
    row, plan = predict(TINY, CONSTANTS, items=100), plan_localize(TINY, 20_000, 5_000)
    net, ready = meta_model(config_of(TINY)), 2 + plan.weights / 2e9
    forward = forward_operations(net, 200, 200)  # of one item
    assert row['evaluate_s_cpu'] == pytest.approx(ready + forward * 100 / 1e9)
    assert row['finetune_s_cpu'] == pytest.approx(ready + 3 * forward * 30 * 16 / 1e9)
    assert plan.flops == 2 * forward_operations(net, 20_000, 200, logits=not net.config.tie_word_embeddings)


@pytest.mark.parametrize('tied', [True, False])
def test_a_forward_pass_counts_its_head_tied_or_not(tied):
    config = config_of(TINY)
    config.tie_word_embeddings = tied
    net = meta_model(config)
    head = net.lm_head.weight.numel()
    body = net.num_parameters() - net.model.embed_tokens.weight.numel() - (0 if tied else head)
    assert forward_operations(net, 1, 0) == 2 * (body + head)
    assert forward_operations(net, 1, 0, logits=False) == 2 * body


def test_fine_tuning_holds_weights_gradients_and_averages():
    row = predict('qwen2.5-7b', CONSTANTS)
    assert row['finetune_gb'] > 16 * row['parameters'] / 1e9


def test_the_recorded_constants_say_where_they_come_from():
    c = load_constants()
    assert {'git', 'versions', 'machine', 'time', 'threads', 'memory', 'size'} <= set(c)
    assert c['validation']
    for r in (*(c[k] for k in FAST), *(r for k in ('matmul', 'localize') for d in c[k].values() for r in d.values())):
        assert 0 < r['least'] <= r['median'] <= r['most']
        assert r['runs'] >= 3
    for v in c['validation']:
        assert v['ratio'] == pytest.approx(v['predicted_s'] / v['measured_s'])


@pytest.mark.slow
def test_measuring_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, '_localize_rates', lambda *a: {'bfloat16': FAST['copy']})
    found = measure_constants(tmp_path, size=1 << 20, runs=1)
    assert not list(tmp_path.iterdir())
    assert all(found[k]['median'] > 0 for k in FAST)
    assert load_constants(write_json(found, tmp_path / 'c.json'))['copy'] == found['copy']


@pytest.fixture
def scale():
    "The script benchmarks/scale.py as a module."
    spec = importlib.util.spec_from_file_location('scale', Path(__file__).parents[1] / 'benchmarks' / 'scale.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trial(scale, tmp_path, monkeypatch):
    "Rows of a trial on a tiny shape; the transfer runs in a new interpreter, localising in this one."
    real, shape = machine.timed, TINY | dict(vocab_size=len(load_tokenizer('lab/base')))

    def timed(module, name, *args):
        if name == 'transfer_checkpoint':
            return real(module, name, *args)
        getattr(machine, name)(*args)
        return dict(seconds=2.0, peak=3)

    monkeypatch.setattr(machine, 'timed', timed)
    return scale.trial(CONSTANTS, tmp_path, shape, runs=1, items=2)


@pytest.mark.slow
def test_predictions_are_held_against_the_clock(trial, tmp_path):
    assert not list(tmp_path.iterdir())
    assert [r['what'] for r in trial] == ['transfer', 'localise, both', 'localise, one']
    assert [r['measured_s'] for r in trial[1:]] == [2.0, 2.0]
    for r in trial:
        assert r['ratio'] == r['predicted_s'] / r['measured_s'] > 0
        assert r['measured_peak'] > 0
        assert r['predicted_peak'] > 0
        assert r['model'] == 'own'


@pytest.mark.slow
def test_what_fails_while_timed_says_why(tmp_path):
    with pytest.raises(ActError, match='Checkpoint, which was to be timed, failed.*no config.json'):
        machine.timed('checkpoints', 'Checkpoint', tmp_path / 'no folder')


def test_the_command(tmp_path, monkeypatch, capsys):
    a, b = (sparse_checkpoint(TINY, tmp_path / n) for n in 'ab')
    mask = some(a).save(tmp_path / 'm.safetensors')
    write_json(CONSTANTS, tmp_path / 'c.json')

    def run(line):
        monkeypatch.setattr(sys, 'argv', ['act_plan', *line.split()])
        return act_plan.main() or 0, *capsys.readouterr()

    code, out, _ = run(f'--target {a} --donor {b} --mask {mask} --lam 0.5 --constants {tmp_path}/c.json')
    assert code == 0
    assert repr(plan_transfer(a, b, mask, 0.5)) in out
    assert ') on a cpu, 2 cores' in out
    code, out, _ = run('--model qwen2.5-7b')
    assert code == 0
    assert 'parameters: 7,615,616,512' in out
    assert f"constants: {load_constants()['machine']['cpu']}" in out
    for line, message in (
        (f'--target {a}', 'needs --target'),
        (f'--model qwen2.5-7b --target {a}', 'needs --target'),
        ('', 'needs --target'),
        ('--model qwen9', 'one of qwen2.5'),
        (f'--measure {tmp_path}', 'needs --constants'),
        (f'--target {a} --donor {b} --mask {mask} --lam x', "lam is 'x'"),
        ('--model qwen2.5-7b --constants none.json', 'act_plan --measure'),
    ):
        code, _, err = run(line)
        assert code == 2 and message in err, line


def test_plans_show_themselves(tmp_path):
    a, b = (sparse_checkpoint(TINY, tmp_path / n) for n in 'ab')
    for plan in (plan_transfer(a, b, some(a)), plan_localize('llama-2-7b', 2000, 500)):
        lines = repr(plan).splitlines()
        assert len(lines) >= 5
        assert '<table' in plan._repr_html_()
        assert plan._repr_html_().count('<tr>') == len(lines)
