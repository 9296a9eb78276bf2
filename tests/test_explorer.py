"""The explorer: complete grids, files that come back unchanged, pictures that run no model.

The page's sliders show what the table holds.
"""

import itertools, json, shutil, sys
from dataclasses import replace
from html.parser import HTMLParser
import numpy as np, pandas as pd, pytest
from act.channels import enumerate_channels
from act.commands.studies import act_explore
from act.kit.errors import ActError
from act.studies import explorer
from act.studies.grid import *
from act.studies.explorer import *
from act.scores import ChannelScores
from act.studies.cases import CASES, RESULTS
from act.studies.recovery import Recovery
from conftest import tiny_model
import torch

VOID = 'meta input br'.split()


class Page(HTMLParser):
    "Elements with their attributes, all closed in order."

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.data = [], [], None
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if self.open and self.open[-1][1].get('class') == 'data':
            self.data = json.loads(text)

    def all(self, tag, **want):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in want.items())]


@pytest.fixture(scope='module')
def lab():
    return Explorer.load()


def grid(
    ps=(0.1, 0.5),
    lams=(0.5, 1.0),
    ranks=('raw', 'module'),
    sfts=(False, True),
    columns=('retained', 'recovered', 'others', 'mean'),
    scale=1.0,
):
    "A grid whose every value differs."
    rows = [('target', None, None, None, None, c, 0.9 * scale, 0.8 * scale, scale) for c in columns]
    for k, (s, r, p, lam) in enumerate(itertools.product(sfts, ranks, ps, lams)):
        rows += [
            ('ACT', p, lam, r, s, c, v, v - 0.05, v + 0.05)
            for i, c in enumerate(columns)
            for v in [scale * (0.1 + 0.01 * k + 0.2 * i)]
        ]
    return pd.DataFrame(rows, columns='row p lam rank sft column value low high'.split())


@pytest.fixture(scope='module')
def scores():
    cm = enumerate_channels(tiny_model())
    return ChannelScores.from_flat(torch.rand(cm.total, generator=torch.Generator().manual_seed(0)), cm)


def test_the_recorded_grid_is_whole(lab):
    assert (
        (tuple(lab.ps), tuple(lab.lams)) == (PS, LAMS) and lab.ranks == ['raw', 'module'] and lab.sfts == [False, True]
    )
    assert list(lab.given) == ['target', 'donor', 'target + SFT'] and lab.columns == [
        'retained',
        'recovered',
        'others',
        'mean',
    ]
    assert (
        lab.meta['split'] == 'validation'
        and lab.meta['used'] == 0
        and lab.meta['git']
        and lab.meta['seed'] == 0
        and lab.meta['machine']
        and len(lab.meta['data']) == 13
    )
    g = lab.grid
    assert (
        g[['value', 'low', 'high']].map(lambda v: 0 <= v <= 1).all().all()
        and ((g.low <= g.value) & (g.value <= g.high)).all()
    )
    both = g[g.p == 1].pivot(index=['lam', 'sft', 'column'], columns='rank', values='value')
    assert (both.raw == both.module).all()  # all channels, however ranked


def test_the_recorded_grid_agrees_with_the_recovery(lab):
    "The recovery tried some of the points on the same items; another processor may decide an item otherwise."
    tried = Recovery.load(RESULTS / 'recover-lab.json').grid
    assert tried.retained[0] == pytest.approx(lab.given['target']['retained'][0], abs=1e-4) and tried.recovered[
        1
    ] == pytest.approx(lab.given['donor']['recovered'][0], abs=1e-4)
    same = 0
    for row, s in (
        ('ACT without SFT', False),
        ('ACT', True),
        ('ACT (module-normalised) without SFT', False),
        ('ACT (module-normalised)', True),
    ):
        for o in tried[tried.row == row].itertuples():
            v = lab.at(o.setting['p'], o.setting['lam'], o.setting['rank'], s).value
            same += 1
            assert v['recovered'] == pytest.approx(o.recovered, abs=0.1 if s else 0.03) and v[
                'retained'
            ] == pytest.approx(o.retained, abs=0.1 if s else 0.03)
    assert same == 32


def test_recording_is_the_recovery_item_by_item():
    from act.studies.bench import METHODS, Bench

    case = replace(CASES['lab'], others=(), n=10, items=16, sft=dict(steps=2, lr=1e-4, batch_size=4))
    bench = Bench(case, progress=False)
    got = record(case, (0.2, 1.0), (1.0,), bench=bench, progress=False)
    assert got.columns == ['retained', 'recovered', 'mean'] and len(got.points) == 8
    for s, r in itertools.product((False, True), ('raw', 'module')):
        want = bench.values(bench.model(METHODS['ACT'], 0, s, p=0.2, lam=1.0, rank=r), bench.val)
        v = got.at(0.2, 1.0, r, s).value
        assert (
            v['recovered'] == pytest.approx(want['science-zh'].mean())
            and v['retained'] == pytest.approx(want['multiplication-en'].mean())
            and v['mean'] == pytest.approx((v['retained'] + v['recovered']) / 2)
        )
    assert got.at(1.0, 1.0, 'raw').equals(got.at(1.0, 1.0, 'module'))
    assert not {o.prompt for a in bench.val for o in a} & {o.prompt for a in bench.test for o in a}


def test_items_used_before_are_counted(tmp_path):
    from act.sources import load_ability

    for name in ('science-zh', 'multiplication-en'):
        load_ability(f'lab/{name}', n=6).save(tmp_path / f'{name}.jsonl')
    case = replace(
        CASES['lab'],
        recovered=(f'{tmp_path}/science-zh.jsonl',),
        retained=(f'{tmp_path}/multiplication-en.jsonl',),
        others=(),
    )
    e = record(case, (0.5,), (1.0,), ('raw',), (False,), progress=False)
    assert e.meta['used'] == 12 and '12 of the 12 scored items were also used' in e.html()


def test_counts_of_channels(lab, scores):
    modules, counts = chosen_counts(scores, (0.1, 1.0))
    assert all(
        sum(counts[r, 0.1]) == round(0.1 * scores.map.total) and counts[r, 1.0] == list(modules.width)
        for r in ('raw', 'module')
    )
    for k, n in lab.counts.items():
        assert sum(n) == round(k[1] * lab.modules.width.sum())
    df = lab.cells(1.0, 'raw')
    assert (df.stack().dropna() == 100).all() and df.index[0] == '–' and list(df)[:2] == ['embedding', 'norm']


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda g: g.drop(columns='rank'), 'lacks the column rank'),
        (lambda g: g[g.column != 'mean'], 'no values for mean'),
        (lambda g: g[g.p.isna()], 'no points'),
        (lambda g: g.drop(g.index[20]), 'record every combination'),
        (lambda g: pd.concat([g, g.tail(1)]), 'mean twice'),
        (lambda g: pd.concat([g, g.head(1)]), 'twice for target'),
        (lambda g: g.drop(g.index[1]), 'no recovered for target'),
        (lambda g: g.assign(p=g.p * 3), 'is odd'),
        (lambda g: g.assign(value=np.nan), 'is odd'),
        (lambda g: g.assign(lam=np.inf), 'is odd'),
        (lambda g: g.assign(high='x'), 'is odd'),
        (lambda g: g.assign(rank=None), 'is odd'),
        (lambda g: g[~((g.p == 0.5) & (g.lam == 1.0) & g.sft.eq(True))], 'p 50 %, λ 1, ranked raw, with fine-tuning'),
    ],
)
def test_grids_with_holes_are_refused(scores, change, words):
    with pytest.raises(ActError) as e:
        Explorer(change(grid()), scores)
    assert words in str(e.value)


def testpoints_that_were_not_recorded(scores):
    e = Explorer(grid(), scores)
    with pytest.raises(ActError, match=r'lam 0.7 was not recorded: choose one of 0.5, 1.0'):
        e.at(0.1, 0.7)
    with pytest.raises(ActError, match='no column'):
        e.plot('kept')


def test_a_grid_from_a_csv_file(scores, tmp_path):
    grid().to_csv(tmp_path / 'g.csv', index=False)
    a, b = Explorer(pd.read_csv(tmp_path / 'g.csv'), scores), Explorer(grid(), scores)
    assert a.html('x') == b.html('x') and a.best() == b.best() == dict(p=0.5, lam=1.0, rank='module', sft=True)


def test_files_come_back(scores, tmp_path):
    e = Explorer(grid(), scores, dict(case=dict(target='t', donor='d')))
    again = Explorer.load(e.save(tmp_path / 'g.json'))
    assert again.html('x') == e.html('x') and again.counts == e.counts and again.meta == e.meta
    with pytest.raises(ActError, match='end its name'):
        e.save(tmp_path / 'g.txt')
    d = json.loads((tmp_path / 'g.json').read_text())
    for k, odd in dict(grid=5, modules=[], counts=[dict(rank='raw')], format='x', meta=None).items():
        (tmp_path / 'odd.json').write_text(json.dumps({**d, k: odd}))
        if k != 'meta':
            with pytest.raises(ActError):
                Explorer.load(tmp_path / 'odd.json')
        else:
            Explorer.load(tmp_path / 'odd.json')
    for k in d:
        (tmp_path / 'odd.json').write_text(json.dumps({o: v for o, v in d.items() if o != k}))
        with pytest.raises(ActError):
            Explorer.load(tmp_path / 'odd.json')
    for text in ('', '{', '[]'):
        (tmp_path / 'odd.json').write_text(text)
        with pytest.raises(ActError, match='act_explore --record'):
            Explorer.load(tmp_path / 'odd.json')


def test_the_page_holds_every_point(lab, tmp_path):
    text = lab.save(tmp_path / 'e.html').read_text()
    page = Page(text)
    assert len(text) < 200_000 and not any(o in text for o in ('http:', 'https:', ' src=', '@import', 'url('))
    ids = [a['id'] for _, a in page.tags if 'id' in a]
    assert (
        len(ids) == len(set(ids))
        and {a['for'] for a in page.all('label')} <= set(ids)
        and len(page.all('label')) == 5
        and len(page.all('svg', role='img')) == 2
    )
    assert page.all('output')[0]['aria-live'] == 'polite' and set(page.all('output')[0]['for'].split()) <= set(ids)
    for (s, sft), (r, rank), (i, p), (j, lam) in itertools.product(
        *(enumerate(o) for o in (lab.sfts, lab.ranks, lab.ps, lab.lams))
    ):
        want = 100 * lab.at(p, lam, rank, sft).to_numpy()
        assert np.abs(np.array(page.data['values'][s][r][i][j]) - want).max() <= 0.0501
    assert page.data['said']['p'] == ['1 %', '2 %', '5 %', '10 %', '20 %', '30 %', '50 %', '100 %']


def test_two_on_one_page(lab):
    page = Page(lab.html() + lab.html())
    ids, names = [a['id'] for _, a in page.tags if 'id' in a], {a['name'] for a in page.all('input', type='radio')}
    assert len(ids) == len(set(ids)) and len(names) == 2


def test_what_others_wrote_is_escaped(scores):
    bad = '</script><img onerror=x>'
    g = grid(columns=('retained', 'recovered', 'mean', bad), ranks=(bad,)).replace(dict(row=dict(target=bad)))
    modules, counts = chosen_counts(scores, (0.1, 0.5), ('raw',))
    e = Explorer(
        g,
        (modules.assign(kind=bad), {(bad, p): n for (_, p), n in counts.items()}),
        dict(case=dict(target=bad, donor=bad, recovered=[bad]), note=bad),
    )
    text = e.html()
    assert bad not in text and '<img' not in text and Page(text).data['columns'][-1] == bad


def test_one_point_is_enough(scores):
    e = Explorer(grid((0.1,), (1.0,), ('raw',), (False,)), scores)
    page = Page(e.html())
    assert (
        'disabled' in page.all('input', type='checkbox')[0]
        and [a['max'] for a in page.all('input', type='range')] == ['0', '0']
        and len(page.all('input', type='radio')) == 1
    )


def test_bits_are_better_when_lower(scores):
    e = Explorer(grid(scale=2.0), scores, dict(case=dict(metric='bits')))
    assert (
        e.best()['p'] == 0.1
        and not e.best()['sft']
        and e.span[0][0] > e.span[0][1]
        and 'lower is better' in e.html()
        and e.most > 2
    )


def test_a_heat_map(lab):
    import matplotlib.pyplot as plt

    ax = lab.plot('recovered', 'module', True)
    assert [t.get_text() for t in ax.texts][:5] == [
        f"{100 * lab.at(0.01, lam, 'module', True).value['recovered']:.0f}" for lam in lab.lams
    ]
    plt.close('all')


def test_the_picture_of_every_point_has_its_numbers_and_runs_no_model(lab, monkeypatch):
    for name in ('Bench', 'top_p', 'record'):
        monkeypatch.setattr(f'act.studies.grid.{name}', None)
    for key in itertools.product((0.01, 0.2, 1.0), lab.lams, lab.ranks, lab.sfts):
        v = 100 * lab.at(*key).loc['recovered']
        shown = explorer._view(lab, key, 'x')
        assert f'recovered {v.value:.1f} [{v.low:.1f}, {v.high:.1f}]' in shown
        Page(shown)


@pytest.fixture
def run(monkeypatch, capsys):
    "The command as from a shell: (exit code, stdout, stderr)."

    def _run(line):
        monkeypatch.setattr(sys, 'argv', ['act_explore', *line.split()])
        code = act_explore.main()
        return (code or 0, *capsys.readouterr())

    return _run


def test_the_command(run, tmp_path):
    t = tmp_path
    code, out, _ = run(f'--out {t}/dry.html --dry_run')
    assert code == 0 and '160 recorded points' in out and not list(t.iterdir())
    code, out, _ = run(f'--out {t}/e.html')
    assert (
        code == 0
        and '160 points' in out
        and (t / 'e.html').read_text() == Explorer.load().save(t / 'f.html').read_text()
    )
    own = (
        '--record --target lab/maths-en --donor lab/base --recovered lab/science-zh --retained lab/multiplication-en'
        ' --n 8 --ps 0.1 --lams 1 --no_sft'
    )
    code, out, _ = run(f'{own} --out {t}/g.json --dry_run')
    assert code == 0 and '2 models to make and score' in out and f'{t}/g.json' in out and not (t / 'g.json').exists()
    code, out, _ = run(f'{own} --out {t}/g.json')
    assert (
        code == 0
        and Explorer.load(t / 'g.json').ranks == ['raw', 'module']
        and f'next: act_explore --grid {t}/g.json' in out
    )
    assert run(f'--grid {t}/g.json --out {t}/g.html')[0] == 0 and Page((t / 'g.html').read_text()).data['said'][
        'lam'
    ] == ['1']


@pytest.mark.parametrize(
    'line, words',
    [
        ('', 'needs --out'),
        ('--out x.txt', 'end its name'),
        ('--out x.json --target a', 'add --record'),
        ('--out x.json --record --target a', 'needs --donor'),
        ('--out x.json --record --case z', 'choose one of lab'),
        ('--out x.json --record --grid g', 'recorded already'),
        ('--out x.json --record --lams a', "lams is 'a'"),
        ('--out x.json --record --ps 0', "ps is '0'"),
        ('--out x.json --grid none.json', 'not a readable'),
        (
            (
                '--out x.json --record --target lab/maths-en --donor lab/base --recovered lab/none --retained'
                ' lab/science-en'
            ),
            'no lab ability',
        ),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(line)
    assert (
        code == 2
        and err.startswith('error: ')
        and err.count('\n') == 1
        and words in err
        and not list(tmp_path.iterdir())
    )


# in a browser


@pytest.fixture(scope='module')
def browser():
    sync = pytest.importorskip('playwright.sync_api')
    where = next(
        (
            w
            for n in ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
            if (w := shutil.which(n))
        ),
        None,
    )
    with sync.sync_playwright() as p:
        try:
            b = p.chromium.launch(executable_path=where, args=['--no-sandbox'])
        except Exception as e:
            pytest.skip(f'no chromium to start here: {str(e).splitlines()[0]}')
        yield b
        b.close()


@pytest.fixture
def visit(browser, tmp_path):
    "A function that opens text as a page: (page, list of what went wrong)."
    made = []

    def _visit(text, width=1200, **kw):
        (tmp_path / 'page.html').write_text(text, encoding='utf-8')
        made.append(browser.new_context(viewport=dict(width=width, height=900), **kw))
        page, wrong = made[-1].new_page(), []
        page.on('console', lambda m: wrong.append(m.text))
        page.on('pageerror', lambda e: wrong.append(str(e)))
        page.on('request', lambda r: r.url.startswith('file:') or wrong.append(r.url))
        page.goto(f'file://{tmp_path}/page.html')
        return page, wrong

    yield _visit
    for c in made:
        c.close()


@pytest.fixture(scope='module')
def text(lab, tmp_path_factory):
    return lab.save(tmp_path_factory.mktemp('page') / 'e.html').read_text()


def shown(page):
    return page.locator('output').inner_text()


def told(e, p, lam, rank, sft):
    return ', '.join(
        f'{c} {100 * v.value:.1f} [{100 * v.low:.1f}, {100 * v.high:.1f}]'
        for c, v in e.at(p, lam, rank, sft).iterrows()
    )


def test_arrow_keys_step_through_the_recordedpoints(visit, lab, text):
    page, wrong = visit(text)
    start = dict(zip(('p', 'lam', 'rank', 'sft'), lab.start))
    assert told(lab, **start) in shown(page) and start['p'] < 1
    p, lam = page.get_by_role('slider').all()
    p.focus()
    page.keyboard.press('Home')
    lam.focus()
    page.keyboard.press('Home')
    for i, q in enumerate(lab.ps):
        p.focus()
        if i:
            page.keyboard.press('ArrowRight')
        assert p.get_attribute('aria-valuetext') == f'{100 * q:g} %' and told(
            lab, q, 0.25, start['rank'], start['sft']
        ) in shown(page)
    for l in lab.lams[1:]:
        lam.focus()
        page.keyboard.press('ArrowUp')
        assert lam.get_attribute('aria-valuetext') == f'{l:g}' and told(
            lab, 1.0, l, start['rank'], start['sft']
        ) in shown(page)
    assert not wrong


def test_switches_and_pictures_follow(visit, lab, text):
    page, wrong = visit(text)
    p = page.get_by_role('slider').first
    page.get_by_label('raw').check()
    page.get_by_label('fine-tune lightly').uncheck()
    p.focus()
    page.keyboard.press('Home')
    page.keyboard.press('ArrowRight')
    page.keyboard.press('ArrowRight')
    lam = lab.start[1]
    assert told(lab, 0.05, lam, 'raw', False) in shown(page) and 'without fine-tuning' in shown(page)
    want = [v for v in lab.cells(0.05, 'raw').to_numpy().ravel() if v == v]
    got = page.eval_on_selector_all('.c + .n', 'o => o.map(x => x.textContent)')
    assert len(got) == len(want) and all(abs(float(g.replace('<', '')) - v) <= 0.5 for g, v in zip(got, want))
    assert f"{round(0.05 * lab.modules.width.sum()):,} of" in page.locator('#act-map').text_content()
    v = lab.at(0.05, lam, 'raw', False)
    for k, c in enumerate(v.index):
        assert float(page.locator('.f').nth(k).evaluate('o => o.style.width').rstrip('%')) == pytest.approx(
            100 * v.value[c], abs=0.06
        )
    box = [
        page.locator(s).first.evaluate('o => [+o.getAttribute("cx"), +o.getAttribute("cy")]')
        for s in ('.h', f'.d >> nth={lab.lams.index(lam)}')
    ]
    assert box[0] == box[1] and not wrong


def test_the_script_draws_what_python_draws(visit, lab, text):
    "The first look, which Python drew, is the same after the script has drawn it anew."
    page, wrong = visit(text, java_script_enabled=False)
    before = [
        page.locator('output').text_content(),
        *(page.locator(s).nth(i).get_attribute(a) for s, i, a in (('.h', 0, 'cx'), ('.d', 2, 'cy'))),
    ]
    page, wrong = visit(text)
    after = [
        page.locator('output').text_content(),
        *(page.locator(s).nth(i).get_attribute(a) for s, i, a in (('.h', 0, 'cx'), ('.d', 2, 'cy'))),
    ]
    assert before[0] == after[0] and [float(o) for o in before[1:]] == pytest.approx(
        [float(o) for o in after[1:]], abs=0.06
    )


@pytest.mark.parametrize('width', [320, 360, 1200])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_it_fits_and_can_be_read(visit, text, width, scheme):
    page, wrong = visit(text, width, color_scheme=scheme)
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth') and not wrong
    ink, ground = (page.evaluate(f'getComputedStyle(document.body).{o}') for o in ('color', 'backgroundColor'))
    assert (sum(map(int, ink[4:-1].split(','))) < sum(map(int, ground[4:-1].split(',')))) == (scheme == 'light')
    over = page.evaluate(
        "[...document.querySelectorAll('.act-x *')].filter(o => !o.closest('details')"
        ' && o.getBoundingClientRect().width && o.getBoundingClientRect().right > innerWidth + 1)'
        '.map(o => o.outerHTML.slice(0, 80))'
    )
    assert not over


def test_a_dark_quarto_page_is_followed(visit, lab):
    page, wrong = visit(
        f'<!doctype html><body class="quarto-dark" style="background:#222;color:#fff">{lab.html()}</body>'
    )
    assert (
        page.evaluate('getComputedStyle(document.querySelector(".act-x svg text")).fill') == 'rgb(255, 255, 255)'
        and page.evaluate('getComputedStyle(document.querySelector(".act-x")).colorScheme') == 'dark'
        and not wrong
    )


def test_it_starts_when_put_into_a_page_later(visit, lab):
    "As notebooks do it: the text is set, and the scripts in it are made anew."
    page, wrong = visit('<!doctype html><body><div id="out"></div></body>')
    page.evaluate(
        '''text => {
      const host = document.createElement('div'); host.innerHTML = text
      for (const s of host.querySelectorAll('script')) { const n = document.createElement('script'); '''
        '''for (const a of s.attributes) n.setAttribute(a.name, a.value); '''
        '''n.textContent = s.textContent; s.replaceWith(n) }
      document.getElementById('out').append(host)
    }''',
        lab.html(),
    )
    page.get_by_role('slider').first.focus()
    page.keyboard.press('Home')
    assert shown(page).startswith('p 1 %') and not wrong


def test_two_explorers_move_apart(visit, lab):
    page, wrong = visit(f'<!doctype html><body>{lab.html()}{lab.html()}</body>')
    first, second = page.locator('output').all_inner_texts()
    page.get_by_role('slider').first.focus()
    page.keyboard.press('Home')
    now = page.locator('output').all_inner_texts()
    assert first == second == now[1] != now[0] and now[0].startswith('p 1 %') and not wrong


def test_odd_grids_in_the_browser(visit, scores):
    for g, meta in (
        (grid((0.1,), (1.0,), ('raw',), (False,)), {}),
        (grid(scale=2.0), dict(case=dict(metric='bits'))),
        (grid(columns=('retained', 'recovered', 'mean', '</script>')), {}),
    ):
        e = Explorer(g, scores, meta)
        page, wrong = visit(f'<!doctype html><body>{e.html()}</body>')
        page.get_by_role('slider').first.focus()
        page.keyboard.press('Home')
        page.keyboard.press('End')
        assert 'NaN' not in page.locator('.act-x').inner_html() and not wrong
