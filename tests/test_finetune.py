"Fine-tune: answers only, masked channels only, the same for the same seed, stopped in time."
import pytest, torch
from act.abilities import Ability, Item
from act.channels import enumerate_channels
from act.checkpoints import weight_hash
from act.core import ActError
from act.finetune import _collate, _examples, finetune
from act.masks import ChannelMask, random_mask
from act.transfer import mask_slices
from conftest import tiny_model

ABILITY = Ability('toy-en', [Item(f'{a} plus {b} is', f' {a+b}') for a in range(6) for b in range(4)], eos=True)
run = lambda model, tok, **kw: finetune(model, ABILITY, tok, **{**dict(steps=6, lr=1e-2, batch_size=4, progress=False), **kw})
def mask_of(model, p=.2): 
    cm = enumerate_channels(model)
    return random_mask(ChannelMask.from_flat(torch.arange(cm.total) < p*cm.total, cm), 1)

def test_labels_are_the_answer_and_the_end(tokenizer):
    x = _examples([ABILITY[:1]], tokenizer, False, None)[0]
    kept = [t for t in x['labels'] if t != -100]
    assert tokenizer.decode(kept[:-1]) == ' 0' and kept[-1] == tokenizer.eos_token_id and len(x['labels']) == len(x['input_ids'])

def test_no_end_is_taught_unless_the_ability_has_one(tokenizer):
    x = _examples([Ability('a', [Item('x', 'y')])], tokenizer, False, None)[0]
    assert tokenizer.eos_token_id not in x['labels']

def test_prompts_are_taught_when_asked(tokenizer):
    x = _examples([ABILITY[:1]], tokenizer, False, None, prompts=True)[0]
    assert x['labels'] == x['input_ids'] and x['labels'][-1] == tokenizer.eos_token_id
    assert weight_hash(run(tiny_model(), tokenizer, prompts=True).model) != weight_hash(run(tiny_model(), tokenizer).model)

def test_padding_is_not_taught(tokenizer):
    b = _collate([dict(input_ids=[5, 6, 7], labels=[-100, 6, 7]), dict(input_ids=[8], labels=[8])], 0)
    assert b['labels'].tolist() == [[-100, 6, 7], [8, -100, -100]] and b['attention_mask'].tolist() == [[1, 1, 1], [1, 0, 0]] and b['input_ids'][1].tolist() == [8, 0, 0]

def test_it_learns_and_leaves_the_given_model_alone(tokenizer):
    m = tiny_model()
    before = weight_hash(m)
    r = run(m, tokenizer, steps=40)
    assert sum(r.losses[-5:]) < .7*sum(r.losses[:5]) and weight_hash(m) == before != weight_hash(r.model) and len(r.losses) == 40 and r.tokens > 0

def test_the_same_seed_gives_the_same_bits(tokenizer):
    a, b, c = (weight_hash(run(tiny_model(), tokenizer, seed=s).model) for s in (1, 1, 2))
    assert a == b != c

def test_a_mask_keeps_everything_else_bit_for_bit(family, tokenizer):
    m = tiny_model(family)
    mask = mask_of(m)
    new, old, slices = dict(run(m, tokenizer, mask=mask).model.named_parameters()), dict(m.named_parameters()), mask_slices(mask)
    moved = 0
    for name in old:
        if name not in slices: assert torch.equal(new[name], old[name]); continue
        axis, chosen = slices[name]
        assert torch.equal(new[name].index_select(axis, (~chosen).nonzero()[:, 0]), old[name].index_select(axis, (~chosen).nonzero()[:, 0])), name
        moved += int((new[name] != old[name]).sum())
    assert moved > 0 and all(p.requires_grad for p in new.values())

def test_half_precision_is_trained_in_float32_and_comes_back_half(tokenizer):
    m = tiny_model(dtype=torch.bfloat16)
    mask = mask_of(m)
    r = run(m, tokenizer, mask=mask)
    assert r.model.dtype == torch.bfloat16 and weight_hash(r.model) != weight_hash(m)

def test_early_stopping_puts_the_best_weights_back(tokenizer):
    val = Ability('other-en', [Item('9 plus 9 is', ' 18'), Item('8 plus 9 is', ' 17')])
    r = run(tiny_model(), tokenizer, steps=60, lr=.05, validation=val, eval_steps=2, patience=2)
    best = min(l for _, l in r.eval_losses)
    assert len(r.losses) < 60 and dict(r.eval_losses)[r.best_step] == best
    again = finetune(r.model, ABILITY, tokenizer, steps=1, lr=1e-12, validation=val, eval_steps=1, progress=False)
    assert abs(again.eval_losses[0][1] - best) < 1e-4

def test_lora_is_merged_and_its_adapter_gives_the_same_model(tokenizer, tmp_path):
    from peft import PeftModel
    m = tiny_model('smollm2')
    r = run(m, tokenizer, lora=dict(r=2, target_modules='all-linear'), adapter=tmp_path/'adapter')
    merged = PeftModel.from_pretrained(tiny_model('smollm2'), tmp_path/'adapter').merge_and_unload()
    assert {k for k, _ in r.model.named_parameters()} == {k for k, _ in m.named_parameters()}
    assert all(torch.allclose(p, q, atol=2e-2) for p, q in zip(r.model.parameters(), merged.parameters())) and weight_hash(r.model) != weight_hash(m)
    assert torch.equal(r.model.model.embed_tokens.weight, m.model.embed_tokens.weight)

@pytest.mark.parametrize('kw, word', [(dict(steps=0), 'above zero'), (dict(lr=0), 'above zero'), (dict(lr=float('nan')), 'above zero'), (dict(batch_size=0), 'above zero'),
    (dict(adapter='x'), 'lora='), (dict(max_length=1), 'no answer tokens left')])
def test_settings_that_cannot_work(tokenizer, kw, word):
    with pytest.raises(ActError, match=word): run(tiny_model(), tokenizer, **kw)

def test_a_mask_refuses_what_would_change_other_channels(tokenizer):
    m = tiny_model()
    for kw in (dict(weight_decay=.1), dict(lora=dict(r=2))):
        with pytest.raises(ActError, match='neither LoRA nor weight decay'): run(m, tokenizer, mask=mask_of(m), **kw)

def test_nothing_to_learn_from(tokenizer):
    with pytest.raises(ActError, match='no abilities'): finetune(tiny_model(), [], tokenizer)

def test_two_processes_end_with_one_model(tmp_path):
    import subprocess, sys
    (tmp_path/'job.py').write_text('''
import sys, torch.distributed as d
from act.abilities import load_ability
from act.checkpoints import load_model, weight_hash
from act.finetune import finetune
model, tok = load_model('lab/maths-en', dtype='float32')
report = finetune(model, load_ability('lab/science-zh', 'sft'), tok, steps=2, batch_size=4, progress=False)
open(f'{sys.argv[1]}/rank{d.get_rank()}of{d.get_world_size()}', 'w').write(f'{weight_hash(report.model)} {weight_hash(model)}')
''')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=29533', str(tmp_path/'job.py'), str(tmp_path)], capture_output=True, text=True, timeout=240)
    files = sorted(tmp_path.glob('rank*'))
    assert [f.name for f in files] == ['rank0of2', 'rank1of2'], done.stderr[-2000:]
    (a, before), (b, _) = (f.read_text().split() for f in files)
    assert a == b != before
