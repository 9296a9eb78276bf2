"Pairs as people have them: what makes channels incomparable is refused with its reason, what does not is a warning."

import json, warnings
import pytest, torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM
from act.abilities import Ability, Item
from act.channels import EMBEDDING, HEAD
from act.checkpoints import Checkpoint
from act.loading import channels_of, load_model
from act.pairs import check_pair, fitted, preflight
from act.writer import untie
from act.kit.errors import ActError
from act.kit.processes import ActWarning
from act.apply import apply_delta
from act.deltas import make_delta
from act.commands.way import act_localize
from act.localize import localize
from act.masks import top_p
from act.scores import ChannelScores, weight_scores
from act.streaming import transfer_checkpoint
from act.transfer import transfer
from conftest import tiny_model, toy_tokenizer

ABILITY = Ability('sums', [Item(f'what is {i} plus {i}? ', str(2 * i)) for i in range(40)])


def edit(folder, name, **change):
    "Change keys of a JSON file; None takes a key out."
    d = json.loads((folder / name).read_text())
    d.update(change)
    (folder / name).write_text(json.dumps({k: v for k, v in d.items() if v is not None}))


def resized(seed, rows, family='llama3'):
    "A tiny model with another number of rows of vocabulary."
    from conftest import tiny_config

    config = tiny_config(family)
    config.vocab_size = rows
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def make(tmp_path):
    "make(name, model, tokenizer) saves a folder."

    def _make(name, model, tokenizer=None):
        model.save_pretrained(tmp_path / name)
        (tokenizer or toy_tokenizer()).save_pretrained(tmp_path / name)
        return tmp_path / name

    return _make


@pytest.fixture
def two(make):
    return make('target', tiny_model('qwen2_untied', 0)), make('donor', tiny_model('qwen2_untied', 1))


def said(f, *args, **kwargs):
    "The warnings of a call, as one text."
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return ' | '.join(str(w.message) for w in log if issubclass(w.category, ActWarning))


# what is accepted


@pytest.mark.parametrize('token', ['eos_token', 'bos_token', 'pad_token'])
def test_names_of_tokens_are_a_warning(two, token):  # Qwen2.5, Llama 3 and SmolLM2: base and instruct
    edit(two[0], 'tokenizer_config.json', **{token: '<bos>' if token == 'eos_token' else '<eos>'})
    assert token in said(check_pair, *two)


def test_ids_of_tokens_in_the_configuration_say_nothing(two):
    edit(two[0], 'config.json', eos_token_id=[1, 2], bos_token_id=None, pad_token_id=1)
    assert said(check_pair, *two) == ''


def test_a_window_that_is_not_used_may_differ(two):  # Qwen2.5-0.5B: max_window_layers 24 and 21
    for folder, layers in zip(two, (24, 21)):
        edit(
            folder,
            'config.json',
            use_sliding_window=False,
            sliding_window=32768 - layers,
            max_window_layers=layers,
            layer_types=None,
        )
    assert said(check_pair, *two) == ''


def test_positions_that_a_model_may_read_say_nothing(two):
    edit(two[0], 'config.json', max_position_embeddings=4096)
    assert said(check_pair, *two) == ''


def test_an_added_token_that_no_text_uses_is_a_warning(make):
    more = toy_tokenizer()
    more.add_tokens(['<|PAD_TOKEN|>'])
    a, b = make('a', resized(0, 301), more), make('b', resized(1, 301))
    assert '<|PAD_TOKEN|>' in said(check_pair, a, b)


def test_an_added_token_that_a_text_uses_is_refused(make):
    more = toy_tokenizer()
    more.add_tokens(['two plus'])
    a, b = make('a', resized(0, 301), more), make('b', resized(1, 301))
    with pytest.raises(ActError, match="other ids for the same text, 'two plus two'"):
        check_pair(a, b, texts=['two plus two'])


def test_an_end_token_that_one_tokenizer_adds_does_not_count(make):
    ends = toy_tokenizer()
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single='$A <eos>', pair='$A $B', special_tokens=[('<eos>', 2)]
    )
    check_pair(make('a', tiny_model('llama3', 0), ends), make('b', tiny_model('llama3', 1)))


def test_a_first_token_that_one_tokenizer_adds_is_refused(make):
    begins = toy_tokenizer()
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single='<bos> $A', pair='$A $B', special_tokens=[('<bos>', 1)]
    )
    with pytest.raises(ActError, match='other ids for the same text'):
        check_pair(make('a', tiny_model('llama3', 0), begins), make('b', tiny_model('llama3', 1)))


def test_buffers_are_not_weights(two):  # Llama-2 on the hub stores them, nothing saved since does
    file = two[1] / 'model.safetensors'
    save_file(
        load_file(file) | {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': torch.ones(2) for i in range(2)},
        file,
        metadata=dict(format='pt'),
    )
    assert preflight(*two).channels == channels_of(two[0]).total


# what is refused


@pytest.mark.parametrize(
    'key, value, why',
    [
        ('rope_theta', 10000.0, 'other angles'),
        ('rope_parameters', dict(rope_type='default', rope_theta=1e6), 'other angles'),
        ('rms_norm_eps', 1e-3, 'compute something else'),
        ('hidden_act', 'gelu', 'compute something else'),
        ('num_attention_heads', 2, 'other channels'),
        ('model_type', 'llama', 'other channels'),
    ],
)
def test_what_makes_channels_incomparable_is_refused_with_the_reason(two, key, value, why):  # Qwen2.5-Math: rope_theta
    edit(two[0], 'config.json', **dict(dict(rope_parameters=None) if key == 'rope_theta' else {}, **{key: value}))
    if key == 'rope_theta':
        edit(two[1], 'config.json', rope_parameters=None, rope_theta=1e6)
    with pytest.raises(ActError, match=why):
        check_pair(*two)


@pytest.mark.parametrize(
    'kind, key',
    [
        ('gemma3_text', 'query_pre_attn_scalar'),
        ('granite', 'embedding_multiplier'),
        ('granite', 'logits_scaling'),
        ('granite', 'residual_multiplier'),
        ('cohere', 'logit_scale'),
    ],
)
def test_multipliers_are_compared(kind, key):
    from transformers import AutoConfig
    from conftest import SIZES

    a, b = (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **SIZES, head_dim=8, **{key: v if key == 'query_pre_attn_scalar' else v / 8})
        )
        for v in (8, 4)
    )
    with pytest.raises(ActError, match=f'differ in {key}'):
        check_pair(a, b)


def test_one_folder_under_two_names_is_one_model(two, tmp_path):
    (tmp_path / 'link').symlink_to(two[0])
    for same in (two[0], str(two[0]) + '/', tmp_path / 'link'):
        with pytest.raises(ActError, match='are the same model'):
            check_pair(two[0], same)


def test_a_key_that_nobody_knows_is_a_warning(two):
    edit(two[0], 'config.json', new_trick=2)
    assert 'new_trick' in said(check_pair, *two)


def test_a_difference_in_ties_is_explained_and_has_a_way_out(make, tmp_path):  # Sailor and Qwen1.5
    tied, own = make('tied', tiny_model('qwen2', 0)), make('own', tiny_model('qwen2_untied', 1))
    with pytest.raises(ActError, match='untie'):
        check_pair(tied, own)
    check_pair(untie(tied, tmp_path / 'apart'), own)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(load_model(tmp_path / 'apart')[0](ids).logits, load_model(tied)[0](ids).logits)


def test_every_command_has_the_same_way_past_the_check(two, tmp_path):
    edit(two[0], 'config.json', rms_norm_eps=1e-3)
    options = dict(
        target=str(two[0]),
        donor=str(two[1]),
        ability=str(ABILITY.save(tmp_path / 'sums.jsonl')),
        out=str(tmp_path / 's'),
        split='all',
    )
    with pytest.raises(ActError, match='rms_norm_eps'):
        act_localize(**options)
    act_localize(**options, no_check=True)
    assert ChannelScores.load(tmp_path / 's').flat().any()


# other numbers of rows of vocabulary


@pytest.fixture(params=[(300, 310), (310, 300)], ids=['donor has more', 'donor has fewer'])
def padded(request, make):
    return tuple(make(n, resized(seed, rows)) for seed, (n, rows) in enumerate(zip(('target', 'donor'), request.param)))


def test_other_rows_of_vocabulary_are_a_warning(padded):
    assert 'rows of vocabulary' in said(check_pair, *padded)


def test_rows_that_both_have_move_and_the_others_stay(padded, tmp_path):
    target, donor = (Checkpoint(f) for f in padded)
    mask = ~top_p(weight_scores(*padded), 0.001) | top_p(weight_scores(*padded), 0.001)  # every channel
    out = Checkpoint(transfer_checkpoint(*padded, mask, 1.0, tmp_path / 'out'))
    n = min(c.tensors[HEAD].shape[0] for c in (target, donor))
    for name in (EMBEDDING, HEAD):
        assert torch.equal(out.read(name, 0, n), donor.read(name, 0, n))
        assert torch.equal(out.read(name, n), target.read(name, n))
    other = 'model.layers.0.mlp.up_proj.weight'
    assert torch.equal(out.read(other), donor.read(other))


@pytest.mark.parametrize('lam', [1.0, 0.3])
def test_every_way_of_transferring_agrees_to_the_bit(padded, tmp_path, lam):
    mask = top_p(weight_scores(*padded), 0.5)
    folder = transfer_checkpoint(*padded, mask, lam, tmp_path / 'out')
    (target, _), (donor, _) = (load_model(f) for f in padded)
    memory = transfer(target, donor, mask, lam).state_dict()
    delta = make_delta(*padded, mask, lam, tmp_path / 'd.safetensors')
    applied = apply_delta(padded[0], delta, tmp_path / 'applied')
    undone = apply_delta(applied, delta, tmp_path / 'undone', undo=True)
    streamed, was = load_file(folder / 'model.safetensors'), load_file(padded[0] / 'model.safetensors')
    for k, v in streamed.items():
        assert torch.equal(v, memory[k])
        assert torch.equal(v, load_file(applied / 'model.safetensors')[k])
        assert torch.equal(was[k], load_file(undone / 'model.safetensors')[k])


def test_rows_that_cannot_move_have_no_score(padded):
    scores = localize(*padded, ABILITY, progress=False)
    n = min(Checkpoint(f).tensors[HEAD].shape[0] for f in padded)
    assert not scores['lm_head'][n:].any()
    assert scores['lm_head'][:n].all()


def test_a_fitted_donor_reads_any_block(padded):
    target, donor = (Checkpoint(f) for f in padded)
    view, n = fitted(donor, target), min(c.tensors[HEAD].shape[0] for c in (target, donor))
    whole = torch.cat([donor.read(HEAD, 0, n), target.read(HEAD, n)])
    for a, b in ((0, 5), (n - 3, len(whole)), (0, len(whole))):
        assert torch.equal(view.read(HEAD, a, b), whole[a:b])
    for idx in ([0, 4], [len(whole) - 1], [3, len(whole) - 1, 7]):
        assert torch.equal(view.rows(HEAD, idx), whole[idx])


# heads


def heads(folder, seed, equal=False):
    "Store a head in a folder that says it is tied."
    file = folder / 'model.safetensors'
    t = load_file(file)
    torch.manual_seed(seed)
    t[HEAD] = t[EMBEDDING].clone() if equal else torch.randn_like(t[EMBEDDING])
    save_file(t, file, metadata=dict(format='pt'))
    return folder


def test_a_stored_head_that_differs_is_untied_in_all_that_is_done(make, tmp_path):
    target, donor = (heads(make(n, tiny_model('qwen2', i)), 5 + i) for i, n in enumerate('td'))
    scores = localize(target, donor, ABILITY, progress=False)
    assert scores.map == channels_of(target)
    assert scores.map.tied is None
    mask = top_p(scores, 0.3, 'module')
    assert 0 < mask['lm_head'].sum() < 300
    out = transfer_checkpoint(target, donor, mask, 1.0, tmp_path / 'out')
    delta = make_delta(target, donor, mask, 1.0, tmp_path / 'd.safetensors')
    applied = apply_delta(target, delta, tmp_path / 'applied')
    undone = apply_delta(applied, delta, tmp_path / 'undone', undo=True)
    t, d, o, a, u = (load_file(f / 'model.safetensors') for f in (target, donor, out, applied, undone))
    assert torch.equal(o[HEAD], torch.where(mask['lm_head'][:, None], d[HEAD], t[HEAD]))
    memory = transfer(load_model(target)[0], load_model(donor)[0], mask).state_dict()
    for k in t:
        assert torch.equal(o[k], a[k])
        assert torch.equal(u[k], t[k])
        assert torch.equal(o[k], memory[k])
    assert torch.equal(load_model(out)[0].lm_head.weight, o[HEAD])  # transformers reads it as it is written


def test_a_stored_head_that_is_the_embedding_is_a_copy(make):
    target, donor = heads(make('t', tiny_model('qwen2', 0)), 0, equal=True), make('d', tiny_model('qwen2', 1))
    check_pair(target, donor)
    assert channels_of(target).tied == 'embedding'


def test_what_the_configuration_leaves_out_transformers_knows(make):  # Gemma is tied by default
    target, donor = heads(make('t', tiny_model('gemma3', 0)), 0, equal=True), make('d', tiny_model('gemma3', 1))
    for f in (target, donor):
        edit(f, 'config.json', tie_word_embeddings=None)
    check_pair(target, donor)
    assert Checkpoint(target).tied
    assert Checkpoint(donor).tied


def test_an_index_may_name_a_tied_head(tmp_path):
    tiny_model('qwen2', 0).save_pretrained(tmp_path / 't', max_shard_size='5KB')
    index = json.loads((tmp_path / 't/model.safetensors.index.json').read_text())
    index['weight_map'][HEAD] = sorted(set(index['weight_map'].values()))[0]
    (tmp_path / 't/model.safetensors.index.json').write_text(json.dumps(index))
    assert Checkpoint(tmp_path / 't').tied


def test_without_a_tie_a_head_that_is_nowhere_is_missed(make):
    folder = make('t', tiny_model('qwen2_untied', 0))
    t = load_file(folder / 'model.safetensors')
    del t[HEAD]
    save_file(t, folder / 'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ActError, match='lacks the tensor lm_head.weight'):
        load_model(folder)
    with pytest.raises(ActError, match='lacks the tensor lm_head.weight'):
        channels_of(folder)


# recipes

RECIPE = """kind: recover
seeds: [0]
train:
  sums: {{model: {model}, abilities: [lab/multiplication-en], steps: 2, lr: 1.0e-4, batch_size: 4}}
case:
  target: train/sums
  donor: {donor}
  recovered: [lab/science-en]
  retained: [lab/multiplication-en]
  others: []
  items: 8
  n: 8
  sft: {{steps: 2, lr: 3.0e-4, batch_size: 4}}
  grid: {{ps: [0.1], lams: [1.0]}}
"""


def test_a_recipe_finds_a_pair_that_does_not_fit_before_it_trains(two, tmp_path):
    from act.studies.recipe_plan import plan
    from act.studies.recipes import read_recipe
    from act.studies.stages import run_recipe

    edit(two[1], 'config.json', rms_norm_eps=1e-3)
    (tmp_path / 'r.yaml').write_text(RECIPE.format(model=two[0], donor=two[1]))
    recipe = read_recipe(tmp_path / 'r.yaml')
    assert any('rms_norm_eps' in o for o in plan(recipe).problems)
    with pytest.raises(ActError, match='rms_norm_eps'):
        run_recipe(recipe, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


# what a model was trained on


def test_what_a_target_was_trained_on_is_known_of_what_comes_out_of_it(two, tmp_path):
    from act.fingerprints import trained_on

    (two[0] / 'act_finetune.json').write_text(json.dumps(dict(format='act-finetune-1', trained_on=['a1b2c3d4e5f6'])))
    mask = top_p(weight_scores(*two), 0.5)
    moved = transfer_checkpoint(*two, mask, 1.0, tmp_path / 'moved')
    applied = apply_delta(two[0], make_delta(*two, mask, 1.0, tmp_path / 'd.safetensors'), tmp_path / 'applied')
    for folder in (
        two[0],
        moved,
        applied,
        transfer_checkpoint(moved, two[1], top_p(weight_scores(moved, two[1]), 0.1), 1.0, tmp_path / 'again'),
    ):
        assert trained_on(folder) == {'a1b2c3d4e5f6'}
    assert trained_on(two[1]) == set()
