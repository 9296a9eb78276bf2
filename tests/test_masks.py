"Masks: exactly p, ties in order, set algebra, controls of equal size, files that cannot lie."

import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from safetensors import safe_open
from act.channels import ChannelMap, ModuleChannels
from act.kit.errors import ActError
from act.masks import ChannelMask, random_mask, top_p, with_kind
from act.overlap import iou, overlap
from act.scores import ChannelScores, weight_scores
from conftest import tiny_model


def make_map(*widths):
    return ChannelMap(
        [
            ModuleChannels(f'model.layers.{i}.mlp.up_proj', 'up', i, w, ((f'model.layers.{i}.mlp.up_proj.weight', 0),))
            for i, w in enumerate(widths)
        ],
        None,
    )


def scores(*lists):
    return ChannelScores(
        {f'model.layers.{i}.mlp.up_proj': torch.tensor(l, dtype=torch.float32) for i, l in enumerate(lists)},
        make_map(*map(len, lists)),
    )


def chosen(mask):
    return [v.tolist() for v in mask.data.values()]


def test_the_top_of_all_modules_together():
    s = scores([1.0, 9.0, 2.0], [8.0, 3.0, 7.0, 0.0], [4.0])
    assert chosen(top_p(s, 3 / 8)) == [[False, True, False], [True, False, True, False], [False]]


def test_module_normalised_ranks_within_modules():
    s = scores([100.0, 101.0, 99.0], [1.0, 5.0, 0.0])
    assert chosen(top_p(s, 1 / 6)) == [[False, True, False], [False] * 3]
    assert chosen(top_p(s, 1 / 6, 'module')) == [[False] * 3, [False, True, False]]


def test_ties_go_to_the_first_channel():
    assert chosen(top_p(scores([2.0, 2.0], [2.0, 2.0]), 0.75)) == [[True, True], [True, False]]


@pytest.mark.filterwarnings('ignore:only')
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), min_size=1, max_size=7), min_size=1, max_size=4),
    st.floats(0.01, 1.0),
)
def test_count_is_exact_and_no_better_channel_is_left_out(lists, p):
    s = scores(*lists)
    if not s.flat().any():
        with pytest.raises(ActError, match='all scores are zero'):
            top_p(s, p)
        return
    m = top_p(s, p)
    flat, inside = s.flat(), m.flat()
    assert m.count == min(max(1, round(p * len(flat))), int((flat > 0).sum()))
    assert m.count == len(flat) or flat[inside].min() >= flat[~inside].max()
    assert (flat[inside] > 0).all()


@pytest.mark.parametrize('p', [0, -0.1, 1.01, float('nan'), float('inf'), 'x'])
def test_p_out_of_range(p):
    with pytest.raises(ActError, match='fraction of all channels'):
        top_p(scores([1.0, 2.0]), p)


def test_rank_unknown():
    with pytest.raises(ActError, match="'raw' or 'module'"):
        top_p(scores([1.0]), 0.5, 'best')


bits = st.lists(st.booleans(), min_size=6, max_size=6)


def mask(b):
    return ChannelMask.from_flat(torch.tensor(b), make_map(2, 4))


@settings(max_examples=60, deadline=None)
@given(bits, bits)
def test_set_algebra(a, b):
    x, y = mask(a), mask(b)
    assert ~(x | y) == ~x & ~y
    assert x - y == x & ~y
    assert (x | y).count + (x & y).count == x.count + y.count
    union = sum(i or j for i, j in zip(a, b))
    assert iou(x, y) == (sum(i and j for i, j in zip(a, b)) / union if union else 0)
    if x.count and y.count:
        assert overlap(x, y) == (x & y).count / min(x.count, y.count)


def test_masks_of_two_models_do_not_mix():
    with pytest.raises(ActError, match='two different models'):
        mask([True] * 6) | ChannelMask.from_flat(torch.ones(5, dtype=torch.bool), make_map(2, 3))


def test_random_masks_match_in_size_and_repeat_by_seed():
    like = mask([True, False, True, True, False, False])
    for by in ('all', 'module'):
        a = random_mask(like, 1, by)
        assert a.count == 3
        assert a == random_mask(like, 1, by)
        assert any(random_mask(like, s, by) != a for s in range(2, 12))
    assert [int(v.sum()) for v in random_mask(like, 5, 'module').data.values()] == [1, 2]


def test_random_masks_are_even():
    like = ChannelMask.from_flat(torch.arange(50) < 10, make_map(20, 30))
    hits = sum(random_mask(like, s).flat().float() for s in range(400)) / 400
    assert (hits - 0.2).abs().max() < 0.08  # five standard errors of a share of 0.2 in 400 draws are 0.1


def test_shares_sum_to_one():
    m = mask([True, False, True, True, False, False])
    assert m.shares('layer').tolist() == [1 / 3, 2 / 3]
    assert m.fraction == 0.5


def test_weight_scores_by_hand(family):
    a, b = tiny_model(family), tiny_model(family, 1)
    s, pa, pb = weight_scores(a, b), dict(a.named_parameters()), dict(b.named_parameters())
    for m in s.map:
        want = sum(
            (pb[n] - pa[n]).double().square().movedim(axis, 0).reshape(m.width, -1).sum(1) for n, axis in m.params
        ).sqrt()
        assert torch.allclose(s[m.path].double(), want.detach(), rtol=1e-5)


def test_weight_scores_of_folders_equal_those_of_models(checkpoint):
    a, b = tiny_model(), tiny_model(seed=1)
    from_folders = weight_scores(checkpoint('a', a), checkpoint('b', b))
    assert torch.equal(from_folders.flat(), weight_scores(a, b).flat())


def test_files_come_back_as_they_were(tmp_path):
    s = scores([1.0, 9.0, 2.0], [8.0, 3.0])
    m = top_p(s, 0.4)
    s.save(tmp_path / 's')
    m.save(tmp_path / 'm')
    assert torch.equal(ChannelScores.load(tmp_path / 's').flat(), s.flat())
    assert ChannelMask.load(tmp_path / 'm') == m
    assert ChannelMask.load(tmp_path / 'm').meta['p'] == 0.4
    assert ChannelMask.load(tmp_path / 'm').hash == m.hash


def test_the_mask_file_is_plain_safetensors(tmp_path):
    top_p(scores([1.0, 9.0, 2.0], [8.0, 3.0]), 0.4).save(tmp_path / 'm')
    t = load_file(tmp_path / 'm')
    assert {k: (v.dtype, tuple(v.shape)) for k, v in t.items()} == {
        'model.layers.0.mlp.up_proj': (torch.uint8, (3,)),
        'model.layers.1.mlp.up_proj': (torch.uint8, (2,)),
    }


@pytest.fixture
def files(tmp_path):
    s = scores([1.0, 9.0, 2.0], [8.0, 3.0])
    return s.save(tmp_path / 's.safetensors'), top_p(s, 0.4).save(tmp_path / 'm.safetensors')


@pytest.mark.parametrize('keep', [0, 5, 20, 200, -1])
def test_truncated_files_are_refused(files, keep):
    for path, cls in zip(files, (ChannelScores, ChannelMask)):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ActError, match='not a usable'):
            cls.load(path)


def test_one_is_not_the_other(files):
    with pytest.raises(ActError, match='format'):
        ChannelMask.load(files[0])
    with pytest.raises(ActError, match='no mask file'):
        ChannelMask.load(files[0].parent / 'absent')


def rewrite(path, change):
    with safe_open(path, 'pt') as f:
        meta, t = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    change(meta, t)
    save_file(t, path, metadata=meta)


K = 'model.layers.0.mlp.up_proj'


@pytest.mark.parametrize(
    'change',
    [
        lambda m, t: t.update({K: torch.tensor([0, 1, 2], dtype=torch.uint8)}),
        lambda m, t: t.update({K: torch.tensor([0.0, 1.0, 0.0])}),
        lambda m, t: t.update({K: torch.zeros(4, dtype=torch.uint8)}),
        lambda m, t: t.pop(K),
        lambda m, t: t.update(other=torch.zeros(1, dtype=torch.uint8)),
        lambda m, t: m.update(map='{}'),
        lambda m, t: m.update(map='[1'),
        lambda m, t: m.pop('meta'),
    ],
)
def test_masks_that_lie_are_refused(files, change):
    rewrite(files[1], change)
    with pytest.raises(ActError):
        ChannelMask.load(files[1])


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1.0])
def test_scores_that_cannot_be_are_refused(files, value):
    rewrite(files[0], lambda m, t: t.update({K: torch.tensor([1.0, value, 0.0])}))
    with pytest.raises(ActError, match='negative values, NaN or infinity'):
        ChannelScores.load(files[0])


def test_they_render(files):
    for x in (ChannelScores.load(files[0]), ChannelMask.load(files[1])):
        assert '<table' in x._repr_html_()
        assert x.plot().get_xlabel()


def test_a_full_size_vector_is_ranked_exactly():
    n = 17_000_000  # torch.quantile gives up above 16M elements
    cm = ChannelMap([ModuleChannels('lm_head', 'lm_head', None, n, (('lm_head.weight', 0),))], None)
    m = top_p(ChannelScores({'lm_head': torch.arange(n) % 1000 + 0.0}, cm), 0.001)
    assert m.count == 17_000
    assert m.flat()[999::1000].all()


def test_a_kind_taken_whole():
    model = tiny_model('qwen2')
    scores = weight_scores(model, tiny_model('qwen2', 1))
    mask = top_p(scores, 0.1, 'module')
    whole = with_kind(mask)
    assert whole['model.embed_tokens'].all()
    assert (mask - whole).count == 0
    assert {p for p in mask.data if not torch.equal(mask[p], whole[p])} <= {'model.embed_tokens'}
    with pytest.raises(ActError, match='router'):
        with_kind(mask, 'router')


def test_the_same_contents_are_the_same_bytes(tmp_path):
    m = mask([True, False] * 3)
    m.meta.update(ability='a', p=0.1, items=3)
    assert len({m.save(tmp_path / f'{i}').read_bytes() for i in range(20)}) == 1
