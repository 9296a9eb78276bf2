"""What people read: notebooks, pages, links, and how a browser shows them.

`.ci/site.py` holds the checks; each is seen to fail here.
"""

import importlib.util, json, os, shutil
from pathlib import Path
import pytest

spec = importlib.util.spec_from_file_location('site_checks', Path(__file__).parent.parent / '.ci/site.py')
checks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checks)
NAMES = sorted(p.stem for p in (checks.ROOT / 'nbs').glob('*.ipynb'))
TITLE = '# Title\n\n> One line.'


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    return checks.Site(checks.copied(tmp_path_factory.mktemp('site')))


@pytest.fixture(scope='module')
def browser():
    if not shutil.which('chromium'):
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(checks.NO_CHROMIUM)
    with checks.Browser() as b:
        yield b


@pytest.mark.parametrize('name', NAMES)
def test_notebook(name):
    assert not checks.check_notebook(checks.read(checks.ROOT / f'nbs/{name}.ipynb'))


# ---- every check can fail


def cell(kind, text, *outputs, id='x-1'):
    code = dict(execution_count=None, outputs=list(outputs)) if kind == 'code' else {}
    return dict(cell_type=kind, id=id, metadata={}, source=text, **code)


def note(*cells):
    return dict(
        cells=[cell('markdown', TITLE, id='x-0'), *cells],
        metadata=dict(kernelspec=dict(display_name='python3', language='python', name='python3')),
        nbformat=4,
        nbformat_minor=5,
    )


def says(text, name='stdout'):
    return dict(output_type='stream', name=name, text=text)


def value(**data):
    return dict(
        output_type='execute_result',
        data={k.replace('_', '/'): v for k, v in data.items()},
        execution_count=None,
        metadata={},
    )


FIG = "#| label: fig-a\n#| fig-cap: \"A.\"\n"


@pytest.mark.parametrize(
    'nb, fault',
    [
        (dict(cells=[cell('markdown', TITLE + '\n\nMore.')]), 'the first cell must hold'),
        (dict(cells=[cell('markdown', '# Title')]), 'the first cell must hold'),
        (dict(cells=[]), 'the first cell must hold'),
        (note(cell('code', '#| export\ndef f(): pass')), 'no default_exp'),
        (note(cell('markdown', '### Deep')), 'level 3 follows one of level 1'),
        (note(cell('markdown', '## A\n\n#### B')), 'level 4 follows one of level 2'),
        (note(cell('markdown', '# Again')), 'level 1 follows'),
        (note(cell('markdown', '![](a.png)')), 'without alt'),
        (note(cell('markdown', '<img src="a.png">')), 'without alt'),
        (note(cell('code', '1 + 1')), 'not there'),
        (note(cell('code', 'print(1)')), 'not there'),
        (note(cell('code', FIG + '#| fig-alt: "A."\nplot()')), 'not there'),
        (note(cell('code', FIG + 'plot()', value(image_png='AA'))), 'without fig-alt'),
        (note(cell('code', 'plot()', value(image_png='AA'))), 'a picture without fig-alt'),
        (note(*[cell('code', FIG + '#| fig-alt: "A."\nplot()', value(image_png='AA'))] * 2), 'twice'),
        (
            note(cell('code', 'f()', dict(output_type='error', ename='KeyError', evalue='', traceback=[]))),
            'error KeyError',
        ),
        (
            note(cell('code', '#| default_exp a'), cell('code', '#| export\ny = 1'), cell('code', 'import a\nx = a.b')),
            'imports beside other code',
        ),
        (note(cell('code', 'f()', says('x', 'stderr'))), 'stderr'),
        (note(cell('code', 'f()', says('UserWarning: old'))), 'UserWarning'),
        (note(cell('code', 'f()', says(' 40%|####  | 4/10'))), '40%|'),
        (note(cell('code', 'f()', says('kept in /tmp/tmpab12/x'))), 'path of a machine'),
        (note(cell('code', 'f()', value(text_html='<td>/root/a</td>'))), 'path of a machine'),
        (note(cell('markdown', 'See C:\\Users.')), 'path of a machine'),
    ],
)
def test_faults_of_a_notebook(nb, fault):
    found = checks.check_notebook(nb)
    assert len(found) == 1 and fault in found[0]


def test_a_notebook_without_faults():
    assert not checks.check_notebook(
        note(
            cell('markdown', '## A\n\n### B\n\n```sh\n# not a heading, not ![](a picture)\n```\n\n## C'),
            cell('code', 'import a\nfrom b import c'),
            cell('code', '#| eval: false\nimport a\nx = a.b'),
            cell('code', 'x = 1'),
            cell('code', 'f(x)'),
            cell('code', 'x;'),
            cell('code', '#| eval: false\nx'),
            cell('code', '#| hide\nx'),
            cell('code', FIG + '#| fig-alt: "A."\nplot()', value(image_png='/tmp/', text_plain='<Axes>')),
            cell('code', 'x', value(text_plain='/tmpfile, a/home, https://x.y/work, /home/me/a')),
        )
    )


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A site of small notebooks with a fault of every kind."
    at = tmp_path_factory.mktemp('small')
    nbs = at / 'nbs'
    nbs.mkdir()
    settings = (checks.ROOT / 'settings.ini').read_text(encoding='utf-8').splitlines()
    (at / 'settings.ini').write_text(
        '\n'.join(l for l in settings if not l.startswith('procs'))
    )  # without them a link in a signature stays one
    (at / '_quarto.yml').write_text(
        'project: {type: website, resources: [none.txt]}\nbibliography: refs.bib\nformat: {html: {css:'
        ' gone.css}}\nwebsite: {navbar: {left: [{text: A, href: gone.ipynb}]}}\n'
    )
    shutil.copy(at / '_quarto.yml', nbs)
    (nbs / 'sidebar.yml').write_text(
        'website: {sidebar: {contents: [01_good.ipynb, 01_good.ipynb, 02_bad.ipynb, 04_bad.ipynb]}}\n'
    )
    (nbs / 'refs.bib').write_text('@article{known, title={A}}\n')
    (at / 'README.md').write_text('# T\n\n[a](nbs/01_good.ipynb) [b](nbs/gone.ipynb) [c](#t) [d](#u) ![e](gone.png)\n')
    good = note(
        cell(
            'markdown',
            '## Part one {#sec-one}\n\nAs @sec-one, @fig-a and [@known] say; [on](01_good.ipynb#sec-one),'
            ' [out](https://x.y/z), `@fig-no`.',
        ),
        cell('code', FIG + '#| fig-alt: "A."\n1', value(image_png='iVBORw0KGgo='), id='x-2'),
    )
    bad = note(
        cell(
            'markdown',
            '## Part\n\n@fig-a, @tbl-b and [@unknown]; [1](gone.ipynb) [2](01_good.ipynb#gone) [3](#gone)'
            ' [[`x`](https://a.b/c)](gone.ipynb) [4](../settings.ini)'
            ' [5](https://act-companion.github.io/act/good.html#gone) ![p](gone.png)\n\n:::: {.a}\nopen',
        ),
        cell('code', 'import os\nx = 1', id='x-2'),
        cell('code', '#| export\ndef f(a: "no_such_name"): "F."', id='x-3'),
        cell('code', 'f', value(text_html='<a href="gone.html">a</a><img src="01_good.ipynb">'), id='x-4'),
        cell('markdown', '## Dropped -', id='x-5'),
    )
    early = note(
        cell('code', '#| default_exp early', id='x-1'),
        cell('code', '#| export\ndef g(\n    a=1, # as in `load_model`\n): "G."', id='x-2'),
    )
    for n, nb in {'01_good': good, '02_bad': bad, '03_early': early, '04_bad': good}.items():
        (nbs / f'{n}.ipynb').write_text(json.dumps(nb))
    return checks.Site(at)


def test_a_page_without_faults(small):
    assert not small.check_page('01_good')


def test_faults_of_pages(small):
    assert (
        len(small.said['02_bad']) == 2
        and 'cannot process it' in small.said['02_bad'][0]
        and 'imports and other code' in small.said['02_bad'][1]
    )
    bad = checks.read(small.nbs / '02_bad.ipynb')
    bad['cells'] = [c for c in bad['cells'] if c['id'] not in ('x-2', 'x-3')]
    bad['cells'][0]['source'] = '---\ntitle: Another\n---'
    small.pages['02_bad'], small.said['02_bad'] = checks.Page(bad), []
    found = '\n'.join(small.check_page('02_bad'))
    for what in (
        'cell x-2 is not on the page',
        'a link inside a link',
        'the title of the page',
        '@fig-a has no label',
        '@tbl-b has no label',
        '@unknown is not in',
        'gone.ipynb is dead: no such page',
        '01_good.ipynb#gone is dead: no gone on 01_good',
        '#gone is dead: no gone on 02_bad',
        '../settings.ini is dead',
        'good.html#gone is dead: no gone',
        'gone.png is dead',
        'gone.html is dead',
        'Pandoc warns',
        'picture 01_good.ipynb without alt text',
    ):
        assert what in found, what
    found = '\n'.join(small.check_page('03_early'))
    assert "heading 'g' has level 3 after level 1" in found and 'a link written out in code' in found


def test_faults_of_navigation(small):
    found = '\n'.join(small.check_navigation())
    for what in (
        'lists 01_good 2 times',
        'lists 03_early 0 times',
        'css: gone.css',
        'href: gone.ipynb',
        'resources: none.txt',
        'symbolic link',
        '02_bad and 04_bad both make bad.html',
    ):
        assert what in found, what


def test_faults_of_the_readme(small):
    assert sorted(f.split()[1] for f in small.check_readme()) == ['gone.png', 'nbs/gone.ipynb', 'no']


def test_faults_that_a_browser_sees(tmp_path, browser):
    def look(body, head='<title>t</title>', lang=' lang="en"'):
        (tmp_path / 'p.html').write_text(
            f'<!doctype html><html{lang}><head><meta'
            f' charset="utf-8">{head}</head><body><main><h1>T</h1>{body}</main></body></html>'
        )
        return browser.look(tmp_path / 'p.html')

    both = lambda found, what: (
        len(found) == 2 and [f.split(':')[0] for f in found] == list(checks.WIDTHS) and all(what in f for f in found)
    )
    assert not look(
        '<p>All is well.</p><div style="overflow-x: auto" tabindex="0"><div style="width: 2000px">in a box</div></div>'
    )
    assert [f.split(':')[0] for f in look('<div style="width: 600px">wide</div>')] == ['phone']
    assert both(look('<div style="width: 2000px">wide</div>'), 'scrolls sideways: <div style="width: 2000px">')
    assert both(
        look('<p style="overflow: auto; white-space: nowrap"><b>' + 'in a box that no key reaches ' * 30 + '</b></p>'),
        'scrollable-region-focusable',
    )
    assert both(look('<script>console.error("no")</script>'), 'console: no') and both(
        look('<script>throw Error("no")</script>'), 'script error: no'
    )
    assert any('not loaded' in f for f in look('<img src="gone.png" alt="a picture">'))
    assert (
        both(look('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">'), 'axe image-alt')
        and both(look('', lang=''), 'axe html-has-lang')
        and both(look('', head=''), 'axe document-title')
    )
    assert both(look('<p style="color: #aaa">pale</p>'), 'axe color-contrast') and both(look('<input>'), 'axe label')


def test_the_log_of_a_site():
    log = '''[ 1/3] 10_channels.ipynb
\x1b[33mWARN: Unable to resolve link target: gone.ipynb\x1b[39m
[ 2/3] 92_reference.ipynb
WARNING (/opt/quarto/share/filters/main.lua:1234) Unable to resolve crossref @fig-x
[WARNING] Citeproc: citation nobody not found
UserWarning: Found cells containing imports and other code. See FAQ.
NotFound: No such file or directory (os error 2): rename 'index.html.md'
Output created: _docs/index.html
'''
    assert [f.split()[0] for f in checks.log_faults(log)] == [
        'WARN:',
        'WARNING',
        '[WARNING]',
        'UserWarning:',
        'NotFound:',
    ]
    assert not checks.log_faults('[1/2] 51_concentration.ipynb\nOutput created: _docs/index.html\n')


def test_links_of_a_built_site(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'a.css').write_text('')
    (tmp_path / 'index.html').write_text(
        '<link href="a.css"><h1 id="t">T</h1><a href="sub/p.html#part%20one">1</a><a href="#t">2</a><a'
        ' href="./">3</a><a href="https://x.y/z">4</a><a href="https://own.z/s/sub/p.html">5</a><a href="#">6</a>'
    )
    (tmp_path / 'sub/p.html').write_text(
        '<h2 id="part one">P</h2><a href="../index.html#u">1</a><a href="q.html">2</a><img src="../b.png" alt=""><a'
        ' href="https://own.z/s/gone.html">3</a><a href="https://own.z/s/">4</a>'
    )
    assert checks.dead_links(tmp_path, 'https://own.z/s/') == [
        'p.html: ../index.html#u: no such place on the page',
        'p.html: q.html: no such file',
        'p.html: ../b.png: no such file',
        'p.html: https://own.z/s/gone.html: no such file',
    ]


def test_a_build_that_fails_is_told(tmp_path, browser, monkeypatch):
    tool = tmp_path / 'bin' / 'nbdev_docs'
    tool.parent.mkdir()
    monkeypatch.setattr(checks.sys, 'executable', str(tool.parent / 'python'))

    def says(code, make=''):
        tool.write_text(f'#!/bin/sh\necho "WARN: it is late"\n{make}\nexit {code}\n')
        tool.chmod(0o755)

    says(1)
    assert checks.check_built(tmp_path, browser, '-') == [
        'WARN: it is late',
        'nbdev_docs ended with 1',
        'nbdev_docs made no page',
    ]
    says(
        0,
        'mkdir _docs; echo "<html><title>t</title><main><h1>T</h1><a href=gone.html>go on</a></main></html>" >'
        ' _docs/index.html',
    )
    found = checks.check_built(tmp_path, browser, '-')
    assert (
        found[:2] == ['WARN: it is late', 'index.html: gone.html: no such file']
        and all('html-has-lang' in f for f in found[2:])
        and len(found) == 4
    )
