"""Results that display themselves: well formed, escaped, the same bytes each time, no wider than a telephone.

They show the same numbers in a terminal; files that lack something say so.
"""

import json, re, subprocess, sys
import matplotlib

matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, torch
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from matplotlib.axes import Axes
from act.channels import ChannelMap, ModuleChannels
from act.pairs import PairReport
from act.kit.errors import ActError
from act.kit.records import write_json
from act.apply import apply_delta
from act.deltas import Delta, make_delta
from act.evaluate import EvalResult, Paired
from act.studies.findings import Finding, recorded
from act.finetune import FinetuneReport
from act.masks import ChannelMask, random_mask, top_p
from act.overlap import compare, iou, overlap
from act.scores import ChannelScores, ItemScores
from act.studies.merge import Merged
from act.studies.cases import MergeCase
from act.studies.cases import Case
from act.studies.recovery import Recovery
from act.tools.plan import load_constants
from act.show.heatmap import heatmap
from act.show.pieces import COLOURS, bars, intervals, number, strip
from act.show.results import facts, folded, page, table
from act.streaming import TransferReport, transfer_checkpoint
from conftest import tiny_model

BAD = '<script>alert("1")</script>&\''
META = dict(
    ability=BAD, target=BAD, donor='b', tokens=12, provenance=dict(versions=dict(torch='2.13', bad=BAD)), **{BAD: 'key'}
)


def cmap(layers=2):
    at = lambda path, kind, layer, width: ModuleChannels(
        path, kind, layer, width, ((f'{path}.weight', int(kind == 'embedding')),)
    )
    inner = [
        m
        for i in range(layers)
        for m in (
            at(f'model.layers.{i}.self_attn.q_proj', 'q', i, 8),
            at(f'model.layers.{i}.mlp.up_proj', 'up', i, 12),
            at(f'model.layers.{i}.input_layernorm', 'norm', i, 4),
        )
    ]
    return ChannelMap(
        [at('model.embed_tokens', 'embedding', None, 4), *inner, at('model.norm', 'norm', None, 4)], 'embedding'
    )


def scores(layers=2, seed=0, meta=META):
    cm = cmap(layers)
    return ChannelScores.from_flat(torch.rand(cm.total, generator=torch.Generator().manual_seed(seed)), cm, meta)


def evaluation(seed=0, name=BAD):
    rng = np.random.default_rng(seed)
    return EvalResult(
        pd.DataFrame(
            dict(
                ability=[name] * 20 + ['b'] * 10,
                id=[str(i) for i in range(30)],
                correct=rng.integers(0, 2, 30),
                loglik=-rng.random(30),
                bytes=4,
                tokens=2,
            )
        ),
        dict(model=BAD, abilities={name: dict(hash='0')}),
    )


def recovery(cls=Recovery):
    case = (
        Case(BAD, 'd', ('lab/r',), ('lab/k',), ('lab/o',))
        if cls is Recovery
        else MergeCase('lab/base', {'lab/A': ('lab/r',), 'lab/B': ('lab/k',)}, ('lab/o',))
    )
    rows = {
        r: [dict(r=np.array([0.0, 1.0] * 5), k=np.array([1.0] * 10), o=np.array([0.0] * 10))]
        for r in ('target', 'ACT', BAD)
    }
    return cls(
        case,
        rows,
        pd.DataFrame([dict(row='target', setting={}, retained=1.0)]),
        dict(ACT=dict(p=0.1, lam=1.0, rank='raw')),
        dict(seeds=[0], git=BAD),
    )


def folders(tmp_path, checkpoint):
    a, b = checkpoint('a', tiny_model()), checkpoint('b', tiny_model(seed=1))
    from act.loading import channels_of

    cm = channels_of(a)
    m = ChannelMask.from_flat(torch.arange(cm.total) % 7 == 0, cm, dict(ability=BAD, p=0.1))
    return a, b, m


def results(tmp_path, checkpoint):
    s = scores()
    m = top_p(s, 0.3)
    a, b, moved = folders(tmp_path, checkpoint)
    yield s
    yield m
    yield ItemScores(
        torch.rand(3, s.map.total, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2, 3]), s.map, META
    )
    yield compare({BAD: m, 'b': random_mask(m), 'c': ~m})
    yield TransferReport.load(transfer_checkpoint(a, b, moved, 0.5, tmp_path / 'moved'))
    yield Delta.load(make_delta(a, b, moved, 0.5, tmp_path / 'd.safetensors'))
    yield evaluation()
    yield Paired(evaluation(), evaluation(1), (BAD, 'b'))
    yield FinetuneReport(
        None, [2.0 - i / 100 for i in range(90)], [(10, 1.5)], 10, 100, 1.5, dict(abilities={BAD: dict(hash='0')})
    )
    yield PairReport(BAD, 'b', 'qwen2', 10, 5, 'embedding', 20)
    yield recovery()
    yield recovery(Merged)
    yield s.map


def xml(html):
    "The tree of a fragment: every tag closed, every attribute quoted."

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag != 'script'

    Tags().feed(html)
    return ET.fromstring(html)


def fits(tree):
    "Nothing lies outside its picture, and no picture is wider than a telephone."
    for svg in tree.iter('svg'):
        _, _, w, h = map(float, svg.get('viewBox').split())
        assert w <= 340
        assert 'max-width:100%' in svg.get('style')
        assert svg.get('role') == 'img'
        assert svg.get('aria-label') == svg.find('title').text
        for r in svg.iter('rect'):
            assert float(r.get('x')) >= 0
            assert float(r.get('x')) + float(r.get('width')) <= w + 0.01
            assert float(r.get('y')) + float(r.get('height')) <= h + 0.01
        for t in svg.iter('text'):
            assert 0 <= float(t.get('x')) <= w
            assert 0 <= float(t.get('y')) <= h
    for box in tree.iter('table'):
        assert box.find('tbody') is not None
    for box in tree.iter('div'):
        if 'overflow-x' in box.get('style', ''):
            assert box.get('tabindex') == '0'
            assert box.get('aria-label')
            assert box.get('role')


def test_every_result_shows_itself(tmp_path, checkpoint):
    seen = set()
    for x in results(tmp_path, checkpoint):
        html, text = x._repr_html_(), x.report()
        tree = xml(html)
        fits(tree)
        assert html == x._repr_html_()
        assert text == x.report()
        assert ' id="' not in html
        assert '<style' not in html
        assert type(x).__name__ not in seen
        assert '<script' not in html
        assert len(text.splitlines()) > 3
        assert text.splitlines()[0] == x._title() == tree.find('p').text
        seen.add(type(x).__name__)
        if hasattr(x, 'plot'):
            ax = x.plot()
            assert isinstance(ax, Axes)
            assert ax.get_xlabel()
            assert ax.get_ylabel()
            matplotlib.pyplot.close('all')
    assert len(seen) == 13


def test_one_line_stays_one_line(tmp_path, checkpoint):
    for x in results(tmp_path, checkpoint):
        if not isinstance(x, (EvalResult, Recovery)):
            assert '\n' not in repr(x) == str(x)


@pytest.mark.parametrize('layers', [1, 28, 80, 200])
def test_wide_models_stay_within_a_telephone(layers):
    s = scores(layers)
    for x in (s, top_p(s, 0.1)):
        fits(xml(x._repr_html_()))
        assert max(map(len, x._parts().__next__().text.splitlines())) <= 100
    c = s.cells()
    up = [l.split()[1] for l in strip(c.T.values, c.columns, c.index, 'x').text.splitlines() if l.startswith('up ')]
    assert len(''.join(up)) == layers * (2 if layers < 32 else 1)


def test_both_forms_have_the_same_numbers(tmp_path, checkpoint):
    numbers = lambda s: set(re.findall(r'\d[\d,]*\.?\d*', s))
    for x in results(tmp_path, checkpoint):
        for p in x._parts():
            words = ' '.join(t for e in xml(p.html).iter() for t in (e.text, e.get('aria-label')) if t)
            assert numbers(re.sub(r'[▁▂▃▄▅▆▇█]', ' ', p.text)) <= numbers(words), (
                type(x),
                p.text,
                numbers(p.text) - numbers(words),
            )


def test_a_mask_by_hand():
    m = ChannelMask(
        {p: torch.arange(v.shape[0]) < (3 if 'layers.1.mlp' in p else 0) for p, v in scores().data.items()}, cmap()
    )
    strip, bars, most = m._parts()
    assert [l.split() for l in strip.text.splitlines()[1:5]] == [
        ['embedding', '··', '0'],
        ['norm', '······', '0'],
        ['q', '····', '0'],
        ['up', '··██', '12.5'],
    ]
    assert 'most in up, layer 1' in strip.html
    assert '0 to 25 %' in strip.html
    assert '100.0%      (3)   42.9%' in bars.text
    assert most.text.splitlines()[1:] == [
        'path                        chosen  width  share',
        'model.layers.1.mlp.up_proj       3     12  25.0%',
    ]


def test_an_empty_mask_and_a_single_module():
    one = ChannelMap([ModuleChannels('lm_head', 'lm_head', None, 3, (('lm_head.weight', 0),))], None)
    for x in (
        top_p(scores(), 0.5) & ~top_p(scores(), 0.5),
        ChannelMask({'lm_head': torch.ones(3)}, one),
        ChannelScores({'lm_head': torch.zeros(3)}, one),
        ChannelScores({'lm_head': torch.tensor([1.0, 2.0, 3.0])}, one),
    ):
        fits(xml(x._repr_html_()))
        assert x.report()
        assert x.plot().get_xlabel()
    nothing = ChannelMask({'lm_head': torch.zeros(3)}, one)
    o = compare([nothing, nothing])
    assert o.frame()[['shared', 'expected', 'iou', 'overlap']].values.tolist() == [[0, 0, 0, 0]]
    assert np.isnan(o.frame().enrichment[0])
    assert xml(o._repr_html_()) is not None


@pytest.mark.parametrize('i, colour', list(enumerate(COLOURS)))
def test_numbers_can_be_read_on_their_colours(i, colour):
    light = lambda c: sum(
        k * (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4)
        for k, v in zip((0.2126, 0.7152, 0.0722), (int(c[j : j + 2], 16) / 255 for j in (0, 2, 4)))
    )
    a, b = light(colour), 1.0 if i < 8 else 0.0
    assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5
    wide = strip([[float(i), 15.0]], ['a'], 'bc', 'x').html
    assert f'fill="#{colour}"' in wide
    assert f'fill="#{"fff" if i < 8 else "000"}">{i}<' in wide


def test_overlap_is_what_iou_and_overlap_say():
    masks = {k: top_p(scores(seed=k), 0.3) for k in range(4)}
    f = compare(masks).frame()
    for r in f.itertuples():
        x, y = masks[r.a], masks[r.b]
        assert (r.iou, r.overlap, r.shared) == (iou(x, y), overlap(x, y), (x & y).count)
        assert r.expected == pytest.approx(x.count * y.count / x.total)
        assert r.enrichment == pytest.approx(r.shared / r.expected)
    with pytest.raises(ActError, match='two masks'):
        compare([masks[0]])
    with pytest.raises(ActError, match='two different models'):
        compare([masks[0], top_p(scores(3), 0.3)])


def test_overlap_counts_beyond_float32():
    n = (1 << 24) + 3
    cm = ChannelMap([ModuleChannels('lm_head', 'lm_head', None, n, (('lm_head.weight', 0),))], None)
    m = ChannelMask({'lm_head': torch.ones(n, dtype=torch.bool)}, cm)
    assert compare([m, m]).frame().shared[0] == n


def test_what_a_transfer_says(tmp_path, checkpoint):
    a, b, m = folders(tmp_path, checkpoint)
    r = TransferReport.load(transfer_checkpoint(a, b, m, 0.5, tmp_path / 'moved'))
    f = r.frame()
    assert f.channels.sum() == m.count
    assert f.total.sum() == m.total
    assert r.moved[0]['lam'] == 0.5
    assert '\n' not in repr(r)
    want = (
        m.frame()
        .assign(layer=lambda d: d.layer.astype(object).where(d.layer.notna(), '-'))
        .groupby(['kind', 'layer'])[['sum', 'width']]
        .sum()
    )
    assert (
        f.set_index(['kind', 'layer'])[['channels', 'total']].sort_index().values.tolist()
        == want.astype(int).values.tolist()
    )
    by_delta = TransferReport.load(apply_delta(a, make_delta(a, b, m, 0.5, tmp_path / 'd'), tmp_path / 'applied'))
    assert by_delta.frame().equals(f)
    assert by_delta.meta['delta']


@pytest.mark.parametrize(
    'where',
    [
        None,
        5,
        {'up': 7},
        {'up': '0:1/0'},
        {'up': '0:1/2 x'},
        {'up': '0:' + '9' * 50 + '/9'},
        {BAD: '0:1/2'},
        {'up': ''},
    ],
)
def test_notes_without_places_or_with_odd_ones(tmp_path, where):
    write_json(
        dict(
            format='act-transfer-1',
            target=BAD,
            moved=[dict(donor=BAD, lam=1, channels=3, total=9, where=where, ability=BAD * 200, p={})],
        ),
        tmp_path / 'act_transfer.json',
    )
    r = TransferReport.load(tmp_path)
    assert '<script' not in r._repr_html_()
    assert xml(r._repr_html_()) is not None
    assert r.report()
    assert r.plot().get_ylabel()


@pytest.mark.parametrize(
    'moved',
    [
        None,
        5,
        [5],
        [{}],
        [dict(donor=5, lam=1, channels=1, total=1)],
        [dict(donor='a', lam='1', channels=1, total=1)],
        [dict(donor='a', lam=1, channels=1, total=0)],
        [dict(donor='a', lam=1, channels=True, total=1)],
    ],
)
def test_notes_that_are_refused(tmp_path, moved):
    write_json(dict(format='act-transfer-1', target='a', moved=moved), tmp_path / 'act_transfer.json')
    with pytest.raises(ActError, match='act_transfer.json .*record of a transfer'):
        TransferReport.load(tmp_path)
    with pytest.raises(ActError, match='act_transfer.json is not a readable'):
        TransferReport.load(tmp_path.parent)


def finding():
    return recorded('concentration', 'smollm2')


FILES = [
    (EvalResult, lambda p: evaluation().save(p), ['items', 'meta', ('items', 'correct'), ('items', 'tokens')]),
    (Finding, lambda p: finding().save(p), ['name', 'tables', 'meta', ('tables', 'cells', 'rows')]),
    (Recovery, lambda p: recovery().save(p), ['case', 'rows', 'grid', 'best', 'meta', ('case', 'target')]),
    (Merged, lambda p: recovery(Merged).save(p), ['case', ('case', 'base'), 'rows']),
]


@pytest.mark.parametrize('cls, save, key', [(c, s, k) for c, s, keys in FILES for k in keys])
def test_files_that_lack_something_say_what(tmp_path, cls, save, key):
    path, key = save(tmp_path / 'r.json'), (key,) if isinstance(key, str) else key
    cls.load(path)
    d = at = json.loads(path.read_text())
    for k in key[:-1]:
        at = at[k]
    del at[key[-1]]
    path.write_text(json.dumps(d))
    with pytest.raises(ActError, match=f"r.json .*'{key[-1]}'"):
        cls.load(path)
    at[key[-1]] = 5
    path.write_text(json.dumps(d))
    if key[-1] not in ('name', 'best', 'meta', 'target', 'base', 'grid'):  # texts that are shown as they are
        with pytest.raises(ActError, match='r.json is not a usable'):
            cls.load(path)


@pytest.mark.parametrize('key', ['copy', 'start', 'memory', 'localize'])
def test_constants_that_lack_something(tmp_path, key):
    d = load_constants()
    d.pop(key)
    with pytest.raises(ActError, match=f"c.json lacks '{key}'"):
        load_constants(write_json(d, tmp_path / 'c.json'))


def test_two_results_must_be_of_the_same_items():
    with pytest.raises(ActError, match='not of the same items'):
        Paired(evaluation(), evaluation(name='c'))
    t = Paired(evaluation(), evaluation(1)).table()
    assert t.difference.tolist() == pytest.approx((t.a - t.b).tolist())
    assert (t['only a'] - t['only b']).tolist() == pytest.approx((t.difference * t['items']).tolist())


def test_numbers_are_short():
    assert [number(x) for x in (999.6, 1000, np.int64(12345), 1e-9, 1e20, float('nan'), True, 'x', None)] == [
        '1,000',
        '1,000',
        '12,345',
        '1e-09',
        '1e+20',
        '',
        'True',
        'x',
        '',
    ]


def test_a_report_can_be_long_but_not_endless():
    d = {f'k{i}': 'x' * 1000 for i in range(500)}
    assert len(folded('all', d).text.splitlines()) == 62
    assert len(folded('all', d).html) < 40_000


def test_any_value_can_be_an_entry():
    d = dict(
        a=np.zeros(0),
        b=np.arange(3),
        c=[],
        d=(1, '/home/me/x'),
        e=None,
        f=float('nan'),
        g=True,
        h=torch.zeros(2),
        i={},
        j={'/home/me/y': 5},
    )
    assert [l.split(maxsplit=1) for l in facts(d).text.splitlines()] == [
        ['a', '[]'],
        ['b', '[0 1 2]'],
        ['d', '1, x'],
        ['f'],
        ['g', 'True'],
        ['h', 'tensor([0., 0.])'],
        ['j.y', '5'],
    ]


def test_pieces_without_anything():
    for p in (
        strip([], [], [], 'x'),
        strip([[None]], ['a'], ['b'], 'x'),
        bars({}, 'x'),
        intervals([], 'x'),
        table(pd.DataFrame(dict(a=[])), 'x'),
        facts({}),
        page('x'),
    ):
        assert xml(p.html) is not None
        assert str(p) is not None


@pytest.mark.parametrize('module', ['transfer', 'localize', 'overlap', 'masks'])
def test_to_import_it_is_cheap(module):
    heavy = 'pandas', 'matplotlib', 'seaborn', 'transformers'
    code = f"import sys, act.{module}; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_heat_maps_are_labelled():
    grid = pd.DataFrame([[0.5, 12.0]], ['a'], ['b', 'c'])
    ax = heatmap(grid, 'chosen (%)', rows='layer', columns='kind', annot=True)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ('layer', 'kind')
    assert [t.get_text() for t in ax.texts] == ['0', '12']
    assert [a.get_ylabel() for a in ax.figure.axes] == ['layer', 'chosen (%)']
    assert heatmap(grid, ax=matplotlib.pyplot.figure().gca()).figure.axes == [matplotlib.pyplot.gca()]
    matplotlib.pyplot.close('all')
