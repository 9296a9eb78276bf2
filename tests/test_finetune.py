"Fine-tune: answers only, masked channels only, the same for the same seed, stopped in time."

import importlib, json, math, os, subprocess, sys, pytest, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from act.abilities import Ability, Item
from act.encoding import encode
from act.sources import load_ability
from act.channels import enumerate_channels
from act.fingerprints import weight_hash
from act.loading import load_model
from act.kit.errors import PACKAGE, ActError
from act.kit.processes import ActWarning
from act.kit.records import read_json, sha256
from act.pairs import check_tokenizers
from act.commands.way import act_finetune
from act.finetune import _collate, training_rows, finetune, hashes_of
from act.finetune_cost import bits_per_byte, learning_numbers, neutral_text, safe_rate, training_memory
from act.saving import save_like
from act.masks import ChannelMask, random_mask
from act.transfer import mask_slices
from conftest import SIZES, tiny_model
from helpers import HARD, hard

training = importlib.import_module('act.training')

ABILITY = Ability('toy-en', [Item(f'{a} plus {b} is', f' {a + b}') for a in range(6) for b in range(4)], eos=True)


def run(model, tok, **kw):
    return finetune(model, ABILITY, tok, **{**dict(steps=6, lr=1e-2, batch_size=4, progress=False), **kw})


def mask_of(model, p=0.2):
    cm = enumerate_channels(model)
    return random_mask(ChannelMask.from_flat(torch.arange(cm.total) < p * cm.total, cm), 1)


def test_labels_are_the_answer_and_the_end(tokenizer):
    x = training_rows([ABILITY[:1]], tokenizer, False, None)[0]
    kept = [t for t in x['labels'] if t != -100]
    assert tokenizer.decode(kept[:-1]) == ' 0'
    assert kept[-1] == tokenizer.eos_token_id
    assert len(x['labels']) == len(x['input_ids'])


def test_no_end_is_taught_unless_the_ability_has_one(tokenizer):
    x = training_rows([Ability('a', [Item('x', 'y')])], tokenizer, False, None)[0]
    assert tokenizer.eos_token_id not in x['labels']


def test_prompts_are_taught_when_asked(tokenizer):
    x = training_rows([ABILITY[:1]], tokenizer, False, None, prompts=True)[0]
    assert x['labels'] == x['input_ids']
    assert x['labels'][-1] == tokenizer.eos_token_id
    assert weight_hash(run(tiny_model(), tokenizer, prompts=True).model) != weight_hash(
        run(tiny_model(), tokenizer).model
    )


def test_padding_is_not_taught(tokenizer):
    b = _collate([dict(input_ids=[5, 6, 7], labels=[-100, 6, 7]), dict(input_ids=[8], labels=[8])], 0)
    assert b['labels'].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert b['attention_mask'].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert b['input_ids'][1].tolist() == [8, 0, 0]


def test_it_learns_and_leaves_the_given_model_alone(tokenizer):
    m = tiny_model()
    before = weight_hash(m)
    r = run(m, tokenizer, steps=40)
    assert sum(r.losses[-5:]) < 0.7 * sum(r.losses[:5])
    assert weight_hash(m) == before != weight_hash(r.model)
    assert len(r.losses) == 40
    assert r.tokens > 0


def test_the_same_seed_gives_the_same_bits(tokenizer):
    a, b, c = (weight_hash(run(tiny_model(), tokenizer, seed=s).model) for s in (1, 1, 2))
    assert a == b != c


def test_a_mask_keeps_everything_else_bit_for_bit(family, tokenizer):
    m = tiny_model(family)
    mask = mask_of(m)
    new, old, slices = (
        dict(run(m, tokenizer, mask=mask).model.named_parameters()),
        dict(m.named_parameters()),
        mask_slices(mask),
    )
    moved = 0
    for name in old:
        if name not in slices:
            assert torch.equal(new[name], old[name])
            continue
        axis, chosen = slices[name]
        assert torch.equal(
            new[name].index_select(axis, (~chosen).nonzero()[:, 0]),
            old[name].index_select(axis, (~chosen).nonzero()[:, 0]),
        ), name
        moved += int((new[name] != old[name]).sum())
    assert moved > 0
    assert all(p.requires_grad for p in new.values())


def test_half_precision_is_trained_in_float32_and_comes_back_half(tokenizer):
    m = tiny_model(dtype=torch.bfloat16)
    mask = mask_of(m)
    r = run(m, tokenizer, mask=mask)
    assert r.model.dtype == torch.bfloat16
    assert weight_hash(r.model) != weight_hash(m)


def test_early_stopping_puts_the_best_weights_back(tokenizer):
    val = Ability('other-en', [Item('9 plus 9 is', ' 18'), Item('8 plus 9 is', ' 17')])
    r = run(tiny_model(), tokenizer, steps=60, lr=0.05, validation=val, eval_steps=2, patience=2)
    best = min(l for _, l in r.eval_losses)
    assert len(r.losses) < 60
    assert dict(r.eval_losses)[r.best_step] == best
    again = finetune(r.model, ABILITY, tokenizer, steps=1, lr=1e-12, validation=val, eval_steps=1, progress=False)
    assert abs(again.eval_losses[0][1] - best) < 1e-4


def test_validation_does_not_depend_on_batches(tokenizer):
    items = [
        Item('9 plus 9 is', ' 18'),
        Item('one, two, three and on to', ' four, five, six, seven'),
        Item('8 is', ' 8'),
    ]
    val, m, token = Ability('uneven-en', items, eos=True), tiny_model(), dict(steps=1, lr=1e-12, eval_steps=1)
    found = [run(m, tokenizer, validation=val, batch_size=k, **token).eval_losses[0][1] for k in (1, 2, 3)]
    nats, count = 0.0, 0
    for row in training_rows([val], tokenizer, False, None):
        loss = m(torch.tensor([row['input_ids']]), labels=torch.tensor([row['labels']])).loss.item()
        learned = sum(t != -100 for t in row['labels'])
        nats, count = nats + loss * learned, count + learned
    assert found == pytest.approx([nats / count] * 3, rel=1e-5)


def test_lora_is_merged_and_its_adapter_gives_the_same_model(tokenizer, tmp_path):
    from peft import PeftModel

    m = tiny_model('smollm2')
    r = run(m, tokenizer, lora=dict(r=2, target_modules='all-linear'), adapter=tmp_path / 'adapter')
    merged = PeftModel.from_pretrained(tiny_model('smollm2'), tmp_path / 'adapter').merge_and_unload()
    assert {k for k, _ in r.model.named_parameters()} == {k for k, _ in m.named_parameters()}
    assert all(torch.allclose(p, q, atol=2e-2) for p, q in zip(r.model.parameters(), merged.parameters()))
    assert weight_hash(r.model) != weight_hash(m)
    assert torch.equal(r.model.model.embed_tokens.weight, m.model.embed_tokens.weight)


@pytest.mark.parametrize(
    'kw, word',
    [
        (dict(steps=0), 'above zero'),
        (dict(lr=0), 'above zero'),
        (dict(lr=float('nan')), 'above zero'),
        (dict(lr=float('inf')), 'above zero'),
        (dict(batch_size=0), 'above zero'),
        (dict(weight_decay=-1.0), 'zero or more'),
        (dict(seed=-1), 'seed is -1'),
        (dict(seed=1 << 32), 'seed is'),
        (dict(adapter='x'), 'lora='),
        (dict(max_length=1), 'no answer tokens left'),
    ],
)
def test_settings_that_cannot_work(tokenizer, kw, word):
    with pytest.raises(ActError, match=word):
        run(tiny_model(), tokenizer, **kw)


def test_a_mask_refuses_what_would_change_other_channels(tokenizer):
    m = tiny_model()
    for kw in (dict(weight_decay=0.1), dict(lora=dict(r=2))):
        with pytest.raises(ActError, match='neither LoRA nor weight decay'):
            run(m, tokenizer, mask=mask_of(m), **kw)


def test_nothing_to_learn_from(tokenizer):
    with pytest.raises(ActError, match='no abilities'):
        finetune(tiny_model(), [], tokenizer)


def test_two_processes_end_with_one_model(tmp_path, launch):
    done = launch(
        '''
import sys
from act.sources import load_ability
from act.fingerprints import weight_hash
from act.loading import load_model
from act.kit.processes import processes
from act.finetune import finetune
model, tok = load_model('lab/maths-en', dtype='float32')
report = finetune(model, load_ability('lab/science-zh', 'sft'), tok, steps=2, batch_size=4, progress=False)
open(f'{sys.argv[1]}/rank%dof%d' % processes(), 'w').write(f'{weight_hash(report.model)} {weight_hash(model)}')
''',
        tmp_path,
    )
    files = sorted(tmp_path.glob('rank*'))
    assert [f.name for f in files] == ['rank0of2', 'rank1of2'], done.stderr[-2000:]
    (a, before), (b, _) = (f.read_text().split() for f in files)
    assert a == b != before


def test_a_spread_model_learns_the_same(tmp_path, launch):
    """Two processes with FSDP against one process with twice the batches a step; the second never reads the weights.

    Plain, with an adapter, masked, stopped early, and stopped by a crash and resumed.
    """
    model, tok = load_model('lab/maths-en', dtype='float32')
    mask = mask_of(model)
    mask.save(tmp_path / 'mask.safetensors')
    done = launch(
        f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from safetensors.torch import save_file
import importlib
training = importlib.import_module('act.training')
from act.kit.processes import processes
from act.masks import ChannelMask
from helpers import HARD, hard
to, mask = sys.argv[1], ChannelMask.load(sys.argv[1] + '/mask.safetensors')
def save(kind, name, **kw):
    model, tok = importlib.import_module('act.training').load_for_training('lab/maths-en', None)
    report = hard(model.float(), tok, mask, kind, **kw)
    assert (report.model is None) == bool(processes()[0])
    if report.model is not None:
        save_file({{k: p.detach() for k, p in report.model.named_parameters()}}, f'{{to}}/{{name}}.safetensors')
begun, begin, step = [], training.Watch.on_train_begin, training.Watch.on_step_end
def started(self, args, state, control, **kw):
    begun.append(state.global_step)
    begin(self, args, state, control, **kw)
training.Watch.on_train_begin = started
for kind in HARD: save(kind, kind)
def crash(self, args, state, control, **kw):
    if state.global_step == 5: raise KeyboardInterrupt
    step(self, args, state, control, **kw)
for kind in ('stopped', 'lora', 'masked'):
    more = dict(state=f'{{to}}/state-{{kind}}', save_steps=2)
    training.Watch.on_step_end = crash
    try: save(kind, f'again-{{kind}}', **more)
    except KeyboardInterrupt: training.Watch.on_step_end = step
    save(kind, f'again-{{kind}}', **more)
open(f'{{to}}/begun-{{processes()[0]}}', 'w').write(f'{{begun}}')
''',
        tmp_path,
        fsdp=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    new = {k: load_file(tmp_path / f'{k}.safetensors') for k in HARD}
    for kind in HARD:
        one, old = (
            dict(hard(model, tok, mask, kind, accumulate=2).model.named_parameters()),
            dict(model.named_parameters()),
        )
        assert one.keys() == new[kind].keys()
        moved = max((one[k] - old[k]).abs().max().item() for k in old)
        assert max((one[k] - t).abs().max().item() for k, t in new[kind].items()) < 0.01 * moved, kind
    for name, p in model.named_parameters():
        axis, chosen = mask_slices(mask).get(name, (0, torch.zeros(len(p), dtype=bool)))
        outside = (~chosen).nonzero()[:, 0]
        assert torch.equal(new['masked'][name].index_select(axis, outside), p.index_select(axis, outside)), name
    for rank in (0, 1):
        assert json.loads((tmp_path / f'begun-{rank}').read_text()) == [0, 0, 0, 0] + 3 * [0, 4]
    for kind in ('stopped', 'lora', 'masked'):
        again = load_file(tmp_path / f'again-{kind}.safetensors')
        assert all(torch.equal(t, again[k]) for k, t in new[kind].items()), kind


def test_an_output_that_exists_stops_all_processes(tmp_path, launch):
    done = launch(
        'act_finetune', '--model', 'lab/maths-en', '--ability', 'lab/science-zh', '--out', tmp_path, timeout=60
    )
    assert done.returncode
    assert done.stderr.count('exists already') == 1
    assert done.stdout == ''


def test_version_1_of_fsdp_is_refused(tokenizer, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    with pytest.raises(ActError, match='--fsdp_version 2'):
        run(tiny_model(), tokenizer)


SMALL = dict(model='lab/maths-en', ability='lab/science-zh', n=24, steps=8, lr=1e-4, batch_size=4, save_steps=3)
KILLS = dict(
    step=(
        (
            "step = training.Watch.on_step_end; training.Watch.on_step_end = lambda self, a, state, *x, **k: die() if"
            " state.global_step == 5 else step(self, a, state, *x, **k)"
        ),
        3,
    ),
    state=(
        (
            "settle = training.settle_state; training.settle_state = lambda new: die() if new.name.endswith('-6')"
            " else settle(new)"
        ),
        3,
    ),
    model=("importlib.import_module('act.saving').write_json = die", 6),
)


@pytest.mark.parametrize('moment', KILLS)
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, moment):
    code, start = KILLS[moment]
    code = f"""
import importlib, os, signal
from act.commands.way import act_finetune
training = importlib.import_module('act.training')
def die(*_, **k): os.kill(os.getpid(), signal.SIGKILL)
{code}
act_finetune(**{SMALL}, out={str(tmp_path / 'out')!r})
"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == -9
    assert set(os.listdir(tmp_path)) <= {'.out.partial', '.out.lock'}
    begin, steps = training.Watch.on_train_begin, []
    monkeypatch.setattr(
        training.Watch,
        'on_train_begin',
        lambda self, a, state, *x, **k: (steps.append(state.global_step), begin(self, a, state, *x, **k))[0],
    )
    for name in ('out', 'whole'):
        act_finetune(**SMALL, out=tmp_path / name)
    assert steps == [start, 0]
    assert sorted(os.listdir(tmp_path)) == ['out', 'whole']
    assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == (
        tmp_path / 'whole' / 'model.safetensors'
    ).read_bytes()


def test_another_setting_starts_anew(tokenizer, tmp_path, monkeypatch):
    kw = dict(state=tmp_path / 'state', save_steps=2)
    run(tiny_model(), tokenizer, **kw)
    begin, steps = training.Watch.on_train_begin, []
    monkeypatch.setattr(
        training.Watch,
        'on_train_begin',
        lambda self, a, state, *x, **k: (steps.append(state.global_step), begin(self, a, state, *x, **k))[0],
    )
    for more in (dict(), dict(seed=1), dict(lr=2e-2), dict(mask=mask_of(tiny_model()))):
        run(tiny_model(), tokenizer, **kw, **more)
    run(tiny_model(seed=1), tokenizer, **kw)
    assert steps == [4, 0, 0, 0, 0]
    assert len(list((tmp_path / 'state').iterdir())) == 1


def fused():
    "A model whose experts are one tensor in memory and several in files."
    torch.manual_seed(0)
    config = AutoConfig.for_model('mixtral', **SIZES, num_local_experts=2, num_experts_per_tok=1)
    return AutoModelForCausalLM.from_config(config)


RESUMED = dict(
    plain={},
    lora=dict(lora=dict(r=2, target_modules='all-linear')),
    masked=dict(mask=True),
    validated=dict(validation=ABILITY[:5], eval_steps=1, patience=2, lr=0.05, steps=20),
    half=dict(upcast=False),
    fused={},
)


@pytest.mark.parametrize('kind', RESUMED)
def test_a_stopped_run_resumes_to_the_same_bits(tokenizer, tmp_path, monkeypatch, kind):
    model = fused() if kind == 'fused' else tiny_model(dtype=torch.bfloat16 if kind == 'half' else torch.float32)
    kw = dict(RESUMED[kind])
    if kw.get('mask'):
        kw['mask'] = mask_of(model)
    whole = run(model, tokenizer, **kw)
    on_step_end, seen = training.Watch.on_step_end, []

    def stop(self, args, state, control, **more):
        seen.append(state.global_step)
        if len(seen) == 5:
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **more)

    monkeypatch.setattr(training.Watch, 'on_step_end', stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, **kw, state=tmp_path / 'state', save_steps=2)
    again = run(model, tokenizer, **kw, state=tmp_path / 'state', save_steps=2)
    assert seen[:6] == [1, 2, 3, 4, 5, 5]
    assert weight_hash(again.model) == weight_hash(whole.model)
    assert again.losses == whole.losses
    assert again.best_step == whole.best_step
    assert again.tokens == whole.tokens


def test_half_a_state_is_not_read(tokenizer, tmp_path, monkeypatch):
    kw = dict(state=tmp_path / 'state', save_steps=2)
    run(tiny_model(), tokenizer, **kw)
    [state] = (tmp_path / 'state').glob('*/checkpoint-*')
    (state / 'whole').unlink()
    assert training.newest_state(tmp_path / 'state', state.parent.name.removeprefix('act-state-'), 0)[1] is None
    assert not state.exists()


def test_a_second_run_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr('act.training.load_model', lambda *_, **k: pytest.fail('too late'))
    code = (
        f"from act.kit.files import work_folder\nwith work_folder('{tmp_path}/out'): print('in', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == 'in\n'
        with pytest.raises(ActError, match='another run is writing'):
            act_finetune(**SMALL, out=tmp_path / 'out')
        first.communicate('\n')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('kw, size', [(dict(), '8m'), (dict(save_steps=0), '1m')])
def test_a_disk_that_fills_up(small_disk, monkeypatch, kw, size):
    disk = small_disk(size)
    with pytest.raises(ActError, match='no room on disk'):
        act_finetune(**{**SMALL, **kw}, out=disk / 'out')
    assert os.listdir(disk) == []
    for m in ('commands.way', 'training', 'kit.files'):
        monkeypatch.setattr(f'act.{m}.check_room', lambda *_: None)
    with pytest.raises(ActError, match='cannot write .*No space left'):
        act_finetune(**{**SMALL, **kw}, out=disk / 'out')
    assert os.listdir(disk) == []


def test_a_disk_that_is_read_only(small_disk):
    with pytest.raises(ActError, match='is read-only'):
        act_finetune(**SMALL, out=small_disk('1m', readonly=True) / 'out')


def stored(folder):
    "All tensors of a folder's files, by name."
    return {k: t for f in Path(folder).glob('*.safetensors') for k, t in load_file(f).items()}


def mixed(folder, dtype=torch.float32):
    "Rewrite the norms of a checkpoint in another type, with values that bf16 does not hold."
    torch.manual_seed(0)
    for f in folder.glob('*.safetensors'):
        new = {k: torch.rand(t.shape).to(dtype) + 1 / 3 if 'norm' in k else t for k, t in load_file(f).items()}
        save_file(new, f, dict(format='pt'))
    index = folder / 'model.safetensors.index.json'
    if index.exists():
        assert len(list(folder.glob('*.safetensors'))) > 1
    return folder


@pytest.fixture
def items(tmp_path):
    "A jsonl file of ten sums."
    file = tmp_path / 'sums.jsonl'
    file.write_text(''.join(json.dumps(dict(prompt=f'{a} plus {a} is', answer=f' {2 * a}')) + '\n' for a in range(10)))
    return file


def tune(model, items, out, **kw):
    act_finetune(
        **dict(model=str(model), ability=str(items), out=str(out), steps=3, lr=1e-2, batch_size=4, save_steps=0) | kw
    )
    return out


CASES = dict(untied=('qwen2_untied', {}), tied=('qwen2', {}), sharded=('qwen2_untied', dict(max_shard_size='20KB')))


@pytest.mark.parametrize('case', CASES)
def test_types_files_and_names_are_those_of_the_source(checkpoint, items, tmp_path, case):
    family, options = CASES[case]
    a = mixed(checkpoint('a', tiny_model(family, dtype=torch.bfloat16), **options))
    (a / 'chat_template.jinja').write_text('{{ messages }}')
    b = tune(a, items, tmp_path / 'b')
    old, new = stored(a), stored(b)
    assert {k: (t.dtype, t.shape) for k, t in new.items()} == {k: (t.dtype, t.shape) for k, t in old.items()}
    assert {t.dtype for t in new.values()} == {torch.float32, torch.bfloat16}
    assert {f.name for f in b.iterdir()} == {f.name for f in a.iterdir()} | {'act_finetune.json'}
    assert all((b / f.name).read_bytes() == f.read_bytes() for f in a.iterdir() if f.suffix != '.safetensors')
    assert all(not torch.equal(new[k], old[k]) for k in old if 'q_proj.weight' in k or 'norm' in k)
    net, info = AutoModelForCausalLM.from_pretrained(b, dtype='float32', output_loading_info=True)
    assert not info['missing_keys']
    assert not info['unexpected_keys']
    assert all(torch.equal(net.state_dict()[k], t.float()) for k, t in new.items())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
def test_what_did_not_learn_keeps_its_bits(checkpoint, items, tmp_path, dtype):
    a = mixed(checkpoint('a', tiny_model('qwen2_untied', dtype=torch.bfloat16)), dtype)
    model = load_model(a, dtype='float32')[0]
    cm = enumerate_channels(model)
    flat = torch.cat([torch.full((m.width,), m.path.endswith('mlp.up_proj')) for m in cm])
    ChannelMask.from_flat(flat, cm).save(tmp_path / 'mask')
    old, new = stored(a), stored(tune(a, items, tmp_path / 'b', mask=str(tmp_path / 'mask')))
    assert sorted(k for k in old if not torch.equal(old[k], new[k])) == [
        f'model.layers.{i}.mlp.up_proj.weight' for i in (0, 1)
    ]


def test_a_stored_copy_of_a_tied_head_follows_the_embedding(checkpoint, items, tmp_path):
    a = checkpoint('a', tiny_model('qwen2', dtype=torch.bfloat16))
    tensors = stored(a)
    save_file(
        tensors | {'lm_head.weight': tensors['model.embed_tokens.weight'].clone()},
        a / 'model.safetensors',
        dict(format='pt'),
    )
    new = stored(tune(a, items, tmp_path / 'b'))
    assert torch.equal(new['lm_head.weight'], new['model.embed_tokens.weight'])
    assert not torch.equal(new['lm_head.weight'], tensors['model.embed_tokens.weight'])


def test_stored_buffers_stay(checkpoint, items, tmp_path):
    a = checkpoint('a', tiny_model('llama2'))
    save_file(
        stored(a) | {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.tensor([1.0, 0.01])},
        a / 'model.safetensors',
        dict(format='pt'),
    )
    assert stored(tune(a, items, tmp_path / 'b'))[
        'model.layers.0.self_attn.rotary_emb.inv_freq'
    ].tolist() == pytest.approx([1.0, 0.01])


def test_a_model_stored_under_other_names(tokenizer, items, tmp_path):
    "transformers fuses the experts on loading and takes them apart again."
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        'mixtral', **SIZES, num_local_experts=2, num_experts_per_tok=1, tie_word_embeddings=False
    )
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / 'a')
    tokenizer.save_pretrained(tmp_path / 'a')
    a = mixed(tmp_path / 'a')
    old = stored(a)
    assert not any(k in dict(load_model(a)[0].named_parameters()) for k in old if 'experts' in k)
    new = stored(tune(a, items, tmp_path / 'b'))
    assert {k: (t.dtype, t.shape) for k, t in new.items()} == {k: (t.dtype, t.shape) for k, t in old.items()}
    assert any(not torch.equal(new[k], old[k]) for k in old if 'experts' in k)
    assert (tmp_path / 'b' / 'tokenizer.json').read_bytes() == (a / 'tokenizer.json').read_bytes()
    info = AutoModelForCausalLM.from_pretrained(tmp_path / 'b', output_loading_info=True)[1]
    assert not info['missing_keys']
    assert not info['unexpected_keys']


def test_a_legacy_llama_tokenizer_is_not_rewritten(checkpoint, items, tmp_path):
    "transformers would save it with another normaliser, which splits text after a special token differently."
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = [
        '<unk>',
        '<s>',
        '</s>',
        *(f'<0x{i:02X}>' for i in range(256)),
        '▁',
        *'abcdefghijklmnopqrstuvwxyz0123456789',
        '▁t',
        'wo',
        '▁two',
    ]
    t = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)},
            [('▁', 't'), ('w', 'o'), ('▁t', 'wo')],
            unk_token='<unk>',
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    t.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    )
    t.post_processor = processors.TemplateProcessing(
        single='<s> $A', pair='<s> $A <s>:1 $B:1', special_tokens=[('<s>', 1)]
    )
    a = checkpoint('a', tiny_model('llama2'))
    for f in a.glob('*token*'):
        f.unlink()
    t.save(str(a / 'tokenizer.json'))
    (a / 'tokenizer_config.json').write_text(
        json.dumps(
            dict(
                tokenizer_class='LlamaTokenizer',
                bos_token='<s>',
                eos_token='</s>',
                unk_token='<unk>',
                add_bos_token=True,
                add_eos_token=False,
                legacy=True,
            )
        )
    )
    b = tune(a, items, tmp_path / 'b')
    assert all((b / f).read_bytes() == (a / f).read_bytes() for f in ('tokenizer.json', 'tokenizer_config.json'))
    check_tokenizers(a, b)


def test_each_weight_in_memory_gets_its_own_type_back(tokenizer):
    m = tiny_model(dtype=torch.bfloat16)
    m.model.norm.float()
    types = {k: t.dtype for k, t in (*m.named_parameters(), *m.named_buffers())}
    new = run(m, tokenizer).model
    assert len(set(types.values())) == 2
    assert {k: t.dtype for k, t in (*new.named_parameters(), *new.named_buffers())} == types


def test_training_that_diverged_is_not_written(checkpoint, items, tmp_path):
    a, m = checkpoint('a'), tiny_model()
    m.model.norm.weight.data[3] = float('nan')
    with pytest.raises(ActError, match='training left NaN or infinity in model.norm.weight: lower the learning rate'):
        save_like(m, a, tmp_path / 'b')
    assert not (tmp_path / 'b').exists()


# the default rate


def test_the_default_rate_falls_with_the_weights_that_learn():
    rates = [safe_rate(n) for n in (1e3, 1e6, 135e6, 5e8, 7e9, 1e12)]
    assert rates == sorted(rates, reverse=True)
    assert max(rates) <= 5e-5
    assert min(rates) >= 5e-6
    assert safe_rate(7e9) <= 1e-5
    assert safe_rate(5e8) <= 2e-5, 'at 1e-4 a model of this size lost its English in six steps'
    assert safe_rate(135e6, lora=True) == pytest.approx(10 * safe_rate(135e6))


def test_the_default_rate_was_safe_wherever_it_was_measured():
    runs = read_json(
        PACKAGE / 'results' / 'finetune-rates.json',
        'act-finetune-rates-1',
        'table of rates',
        'benchmarks/finetune_rates.py',
    )['runs']
    safe = [r for r in runs if r['lr'] <= 1.01 * safe_rate(r['parameters'], r['kind'] == 'lora')]
    assert {(r['model'], r['kind'], r['ability']) for r in safe} >= {
        (m, 'full', a)
        for m, a in (('lab/base', 'chemistry-zh'), ('lab/base', 'multiplication-en'), ('smollm2', 'gsm8k-en'))
    }
    assert all(r['neutral'] < 1.02 * r['neutral_before'] for r in safe)
    assert any(
        r['neutral'] > 1.02 * r['neutral_before']
        for r in runs
        if r['lr'] <= 4 * safe_rate(r['parameters'], r['kind'] == 'lora')
    ), 'and is not timid'


def test_the_default_rate_is_used_and_recorded(tokenizer):
    big = tiny_model()
    n = sum(p.numel() for p in big.parameters())
    assert run(big, tokenizer, lr=None, steps=1).meta['lr'] == safe_rate(n)
    assert weight_hash(run(big, tokenizer, lr=None).model) == weight_hash(run(big, tokenizer, lr=safe_rate(n)).model)


def test_a_mask_counts_the_weights_that_learn():
    m = tiny_model()
    shapes, cm = {k: tuple(p.shape) for k, p in m.named_parameters()}, enumerate_channels(m)
    mask = ChannelMask.from_flat(torch.arange(cm.total) < 3, cm)
    first = next(iter(cm))
    axes = dict(first.params)
    assert learning_numbers(shapes, mask) == sum(
        3 * (shapes[k][1 - a] if len(shapes[k]) == 2 else 1) for k, a in axes.items()
    )
    assert learning_numbers(shapes, None) == sum(p.numel() for p in m.parameters())


# the neutral text


def test_bits_per_byte_by_hand(tokenizer):
    m, a = tiny_model().double(), Ability('a', [Item('two', ' plus two'), Item('x', ' is four')])
    bits = 0
    for o in a:
        ids, start = tokenizer(o.prompt + o.answer)['input_ids'], len(tokenizer(o.prompt)['input_ids'])
        p = m(torch.tensor([ids])).logits[0].softmax(-1)
        bits -= sum(p[i - 1, ids[i]].log2().item() for i in range(start, len(ids)))
    assert bits_per_byte(m, a, tokenizer) == pytest.approx(bits / 17, rel=1e-5)


def test_a_neutral_text_in_pieces(tmp_path):
    (tmp_path / 't.txt').write_text(
        '\ufeffOne two\nthree.\n\n\nx\n\n二加二等于四\n\n' + 'word ' * 1000, encoding='utf-8'
    )
    a = neutral_text(tmp_path / 't.txt')
    assert [(o.prompt, o.answer) for o in a][:2] == [('One', ' two three.'), ('二', '加二等于四')]
    assert all(len(o.prompt + o.answer) <= 1000 for o in a)
    assert len(a) == 7


def test_before_and_after_are_said_and_kept(checkpoint, items, tmp_path, capsys):
    a = checkpoint('a')
    with pytest.warns(ActWarning, match='lower --lr'):
        b = tune(a, items, tmp_path / 'b', lr=0.1, steps=10)
    record, (net, tok), text = json.loads((b / 'act_finetune.json').read_text()), load_model(b), neutral_text()
    before, after = bits_per_byte(load_model(a)[0], text, tok), bits_per_byte(net, text, tok)
    assert (record['neutral_before'], record['neutral_after']) == pytest.approx((before, after), rel=1e-4)
    assert record['neutral'] == dict(name='neutral.txt', hash=text.hash)
    assert f'neutral.txt: {before:.3f} -> {after:.3f} bits per byte' in capsys.readouterr().out


def test_a_neutral_text_of_ones_own(checkpoint, items, tmp_path, capsys, recwarn):
    (tmp_path / 'own.txt').write_text('cuatro y cuatro son ocho')
    record = json.loads(
        (
            tune(checkpoint('a'), items, tmp_path / 'b', lr=1e-6, neutral=str(tmp_path / 'own.txt'))
            / 'act_finetune.json'
        ).read_text()
    )
    assert record['neutral']['hash'] == neutral_text(tmp_path / 'own.txt').hash != neutral_text().hash
    assert 'own.txt: ' in capsys.readouterr().out
    assert not [w for w in recwarn if 'lower --lr' in str(w.message)]


@pytest.mark.parametrize(
    'kw, word',
    [
        (dict(neutral='none.txt'), 'cannot be read as UTF-8'),
        (dict(seed=-1), 'seed is'),
        (dict(lr=-1.0), 'above zero'),
        (dict(weight_decay=-0.1), 'zero or more'),
        (dict(steps=0), 'above zero'),
    ],
)
def test_bad_settings_end_before_anything_is_loaded(checkpoint, items, tmp_path, monkeypatch, kw, word):
    a = checkpoint('a')
    monkeypatch.setattr('act.training.load_model', lambda *_, **k: pytest.fail('too late'))
    with pytest.raises(ActError, match=word):
        tune(a, items, tmp_path / 'b', **kw)
    assert not (tmp_path / 'b').exists()


# memory


@pytest.mark.slow
def test_memory_is_said_before_it_is_taken(tmp_path):
    code = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from act.abilities import Ability, Item
from act.kit.processes import peak_memory
from act.finetune import finetune
from act.finetune_cost import training_memory
sys.path.insert(0, sys.argv[1])
from conftest import toy_tokenizer
sizes = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, vocab_size=8000)
config = AutoConfig.for_model('llama', num_key_value_heads=8, tie_word_embeddings=True, **sizes)
ability, tok = Ability('a', [Item('two', ' plus two is four'*4)]*8), toy_tokenizer()
torch.ones(8, 8, requires_grad=True).matmul(torch.ones(8, 8)).sum().backward()
if len(sys.argv) > 2: from peft import get_peft_model
before = peak_memory()
model = AutoModelForCausalLM.from_config(config)
shapes = {k: tuple(p.shape) for k, p in model.named_parameters()}
lora = dict(r=8, target_modules='all-linear') if len(sys.argv) > 2 else None
report = finetune(model, ability, tok, steps=2, batch_size=8, lr=1e-5, lora=lora, inplace=True, progress=False)
said = training_memory(config.to_dict(), shapes, report.tokens//2, lora_r=8 if lora else 0)
print(json.dumps([peak_memory() - before, sum(said.values()), said]))
"""
    for more in ([], ['lora']):
        done = subprocess.run(
            [sys.executable, '-c', code, str(Path(__file__).parent), *more], capture_output=True, text=True
        )
        measured, said, parts = json.loads(done.stdout.splitlines()[-1])
        assert said / 1.8 < measured < said * 1.8, (more, measured, parts)


def test_an_adapter_and_a_mask_need_less():
    config = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, vocab_size=100)
    m = tiny_model()
    shapes, cm = {k: tuple(p.shape) for k, p in m.named_parameters()}, enumerate_channels(m)
    mask = ChannelMask.from_flat(torch.arange(cm.total) < 3, cm)
    whole, masked, adapter = (
        training_memory(config, shapes, 64),
        training_memory(config, shapes, 64, mask),
        training_memory(config, shapes, 64, lora_r=1),
    )
    assert whole['weights'] == whole['gradients'] == whole['AdamW'] // 2 == 4 * sum(p.numel() for p in m.parameters())
    assert masked['AdamW'] < whole['AdamW'] > adapter['AdamW'] > 0
    assert training_memory(config, shapes, 128)['activations'] == 2 * whole['activations'] > 0


def test_memory_is_part_of_a_dry_run(checkpoint, items, capsys, monkeypatch, tmp_path):
    a = checkpoint('a')
    monkeypatch.setattr(
        sys, 'argv', ['act_finetune', *f'--model {a} --ability {items} --out {tmp_path}/b --dry_run'.split()]
    )
    try:
        act_finetune.main()
    except SystemExit as e:
        assert not e.code
    out = capsys.readouterr().out
    assert 'memory: about' in out
    assert 'AdamW' in out
    assert 'peak rate' in out


# what was trained on


def test_items_are_named_by_hash():
    o = Item('2+2', '=4')
    assert hashes_of([Ability('a', [o, o]), Ability('b', [Item('2', '+2=4')])]) == sorted(
        {sha256('2+2', '=4')[:12], sha256('2', '+2=4')[:12]}
    )
    assert len(hashes_of([Ability('a', [o, o]), Ability('b', [Item('2', '+2=4')])])) == 2


def test_a_chain_of_trainings_names_the_items_of_all(checkpoint, items, tmp_path):
    other = tmp_path / 'other.jsonl'
    other.write_text(json.dumps(dict(prompt='x plus y is', answer=' z')) + '\n')
    a = tune(checkpoint('a'), items, tmp_path / 'b', validation='lab/science-zh', n=10)
    c = tune(a, other, tmp_path / 'c')
    known = lambda f: json.loads((f / 'act_finetune.json').read_text())['trained_on']
    assert known(a) == hashes_of([load_ability(items), load_ability('lab/science-zh', 'validation', 10)])
    assert known(c) == sorted([*known(a), *hashes_of([load_ability(other)])])


@pytest.mark.parametrize(
    'ability, split, proposed',
    [
        ('lab/science-zh', 'sft', 'lab/science-zh'),
        ('lab/science-zh', 'test', 'ABILITY'),
        ('{items}', 'sft', 'ABILITY'),
        ('lab/science-zh,{items}', 'sft', 'ABILITY'),
    ],
)
def test_the_next_step_is_not_to_score_on_what_was_learned(items, tmp_path, capsys, ability, split, proposed):
    tune('lab/maths-en', ability.format(items=items), tmp_path / 'b', split=split, steps=1, lr=1e-5)
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"next: act_evaluate --model {tmp_path}/b --ability {proposed} --out {tmp_path}/b.json"
    )


def test_a_text_longer_than_the_model_reads_is_measured_in_pieces(tokenizer):
    m = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            'gpt2', n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=300, bos_token_id=1, eos_token_id=2
        )
    ).eval()
    text = Ability('long', [Item('two', ' plus two is four' * 20)])
    e = encode(text, tokenizer)[0]
    ids, nats = torch.tensor(e.input_ids), 0.0
    assert len(ids) > 64
    for i in e.answer:
        first = (i - 1) // 31 * 31  # pieces of 32 tokens; the last of one is the first of the next
        nats -= m(ids[None, first:i]).logits[0, -1].float().log_softmax(-1)[ids[i]].item()
    assert bits_per_byte(m, text, tokenizer) == pytest.approx(
        nats / math.log(2) / len(' plus two is four' * 20), rel=1e-4
    )
