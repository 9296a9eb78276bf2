"Channels: every parameter claimed once, from every source the same, ties counted once, unknown modules named."

import json, pytest, torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig
from act.loading import channels_of
from act.channels import KINDS, ChannelMap, enumerate_channels
from act.kit.errors import ActError
from conftest import SIZES, VOCAB, tiny_config, tiny_model


def by_hand(c):
    "Number of channels counted from the configuration alone, embedding columns and lm_head rows apart."
    hd = getattr(c, 'head_dim', None) or c.hidden_size // c.num_attention_heads
    norms = {'qwen3': 2 * c.hidden_size + 2 * hd, 'gemma3_text': 4 * c.hidden_size + 2 * hd}.get(
        c.model_type, 2 * c.hidden_size
    )
    layer = (
        norms
        + c.num_attention_heads * hd
        + 2 * c.num_key_value_heads * hd
        + c.hidden_size
        + 2 * c.intermediate_size
        + c.hidden_size
    )
    return c.num_hidden_layers * layer + c.hidden_size, c.hidden_size, c.vocab_size


def headers(folder):
    with safe_open(folder / 'model.safetensors', 'pt') as f:
        return {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}


def test_total_equals_a_count_by_hand(family):
    c = tiny_config(family)
    rest, columns, rows = by_hand(c)
    tied = c.tie_word_embeddings
    assert enumerate_channels(c).total == rest + columns + (0 if tied else rows)
    assert enumerate_channels(c, tied='lm_head').total == rest + rows + (0 if tied else columns)


@pytest.mark.parametrize('tied', ['embedding', 'lm_head'])
def test_model_config_and_folder_agree(family, tied, checkpoint):
    model = tiny_model(family)
    folder = checkpoint('m', model)
    cm = enumerate_channels(model, tied)
    assert cm == enumerate_channels(model.config, tied) == channels_of(folder, tied) == channels_of(str(folder), tied)


@pytest.mark.parametrize('tied', ['embedding', 'lm_head'])
def test_every_stored_tensor_is_claimed_once_with_its_width(family, tied, checkpoint):
    stored = headers(checkpoint('m', tiny_model(family)))
    cm = enumerate_channels(tiny_config(family), tied)
    claims = [n for m in cm for n, _ in m.params]
    assert sorted(claims) == sorted(stored)
    assert all(stored[n][axis] == m.width for m in cm for n, axis in m.params)
    assert cm.tied == (tied if tiny_config(family).tie_word_embeddings else None)


def test_a_channel_is_what_moves_one_output(family):
    "Writing into channel i's slices changes output i of that module for the same input, and no other output."
    model = tiny_model(family)
    ids, seen = torch.randint(3, VOCAB, (1, 12)), {}
    mods = dict(model.named_modules())
    for m in enumerate_channels(model):
        hook = mods[m.path].register_forward_hook(lambda mod, i, o: seen.update(i=i, o=o))
        model(ids)
        hook.remove()
        i, before = m.width // 2, seen['o']
        with torch.no_grad():
            for n, axis in m.params:
                model.get_parameter(n).select(axis, i).add_(1)
            moved = (mods[m.path](*seen['i']) != before).flatten(0, -2).any(0)
            for n, axis in m.params:
                model.get_parameter(n).select(axis, i).sub_(1)
        assert moved.shape == (m.width,), m.path
        assert moved.nonzero().flatten().tolist() == [i], m.path


def test_model_order_offsets_and_lookup(family):
    cm = enumerate_channels(tiny_config(family))
    order = [n for n, _ in tiny_model(family).named_modules() if n in cm]
    assert cm.paths == order
    assert [cm.offsets[p] for p in order] == [sum(m.width for m in cm[:i]) for i in range(len(cm))]
    assert all(cm[p] is cm[i] for i, p in enumerate(order))
    assert {m.kind for m in cm} <= set(KINDS)
    assert {m.layer for m in cm} == {None, 0, 1}
    f = cm.frame()
    assert f.width.sum() == cm.total == cm.summary().channels.sum()
    assert len(f) == len(cm)


def test_biases_and_head_norms():
    qwen, q3 = enumerate_channels(tiny_config('qwen2')), enumerate_channels(tiny_config('qwen3'))
    bias = {m.kind for m in qwen if any(n.endswith('bias') for n, _ in m.params)}
    assert bias == {'q', 'k', 'v'}
    assert q3['model.layers.0.self_attn.q_norm'].width == 8
    assert q3['model.layers.0.self_attn.q_proj'].width == 32


def test_map_survives_json(family):
    cm = enumerate_channels(tiny_config(family))
    assert ChannelMap.from_dict(json.loads(json.dumps(cm.to_dict()))) == cm
    for bad in ({}, dict(tied=None, modules=[{}]), dict(tied=None, modules=[dict(path='a')]), []):
        with pytest.raises(ActError):
            ChannelMap.from_dict(bad)


def test_tie_is_read_from_storage_not_from_config():
    model = tiny_model('qwen2')
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert enumerate_channels(model).tied is None
    assert 'lm_head' in enumerate_channels(model).paths


def test_unknown_module_is_named():
    model = tiny_model('llama2')
    model.model.layers[1].mlp.extra_proj = nn.Linear(4, 4)
    with pytest.raises(ActError, match=r'model\.layers\.1\.mlp\.extra_proj'):
        enumerate_channels(model)


def test_unknown_parameter_is_named():
    model = tiny_model('llama2')
    model.model.layers[0].self_attn.q_proj.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ActError, match=r'scale of the module model\.layers\.0\.self_attn\.q_proj'):
        enumerate_channels(model)


def test_other_ties_are_refused():
    model = tiny_model('llama2')
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ActError, match='one storage'):
        enumerate_channels(model)


def test_quantised_weights_are_refused():
    model = tiny_model('llama2')
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(24, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ActError, match='unquantised'):
        enumerate_channels(model)


small = dict(SIZES, num_hidden_layers=1)


@pytest.mark.parametrize(
    'kind,extra,name',
    [
        ('phi3', {}, 'qkv_proj|fused'),
        ('mixtral', dict(num_local_experts=2), 'experts'),
        ('gpt2', dict(n_embd=16, n_layer=1, n_head=2), 'transformer'),
        ('gpt_neox', {}, 'embed_in'),
        (
            'gemma3',
            dict(
                text_config=dict(small, head_dim=8),
                vision_config=dict(
                    hidden_size=8,
                    intermediate_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                    image_size=28,
                    patch_size=14,
                ),
            ),
            'multimodal',
        ),
    ],
)
def test_unsupported_architectures_name_the_module(kind, extra, name):
    config = AutoConfig.for_model(kind, **({} if kind == 'gemma3' else small), **extra)
    with pytest.raises(ActError, match=name):
        enumerate_channels(config)


def test_headers_must_fit_the_config(checkpoint):
    folder = checkpoint('m')
    raw = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(raw | dict(intermediate_size=32)))
    with pytest.raises(ActError, match=r'proj\.weight.*shape'):
        channels_of(folder)
    (folder / 'config.json').write_text(json.dumps(raw | dict(num_hidden_layers=3, layer_types=['full_attention'] * 3)))
    with pytest.raises(ActError, match=r'lacks the tensor model\.layers\.2'):
        channels_of(folder)
    (folder / 'config.json').write_text(json.dumps(raw | dict(num_hidden_layers=1, layer_types=['full_attention'])))
    with pytest.raises(ActError, match=r'holds the tensor model\.layers\.1'):
        channels_of(folder)
    (folder / 'config.json').write_text(json.dumps({'model_type': 'no-such-thing'}))
    with pytest.raises(ActError, match='the configuration of m cannot be read'):
        channels_of(folder)
    (folder / 'config.json').write_text('{')
    with pytest.raises(ActError, match='the configuration of m cannot be read'):
        channels_of(folder)


def test_bad_sources_are_refused(tmp_path):
    for bad in (None, 3, {}):
        pytest.raises(ActError, enumerate_channels, bad)
    with pytest.raises(ActError, match='tied'):
        enumerate_channels(tiny_config('qwen2'), tied='twice')
    with pytest.raises(ActError):
        channels_of(tmp_path)
    with pytest.raises(ActError, match='no channels under'):
        enumerate_channels(tiny_config('qwen2'))['model.layers.9.mlp.up_proj']


def test_the_map_of_a_big_model_needs_no_memory():
    c = AutoConfig.for_model(
        'llama',
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    )
    rest, columns, rows = by_hand(c)
    assert enumerate_channels(c).total == rest + columns + rows
