"""Checks of what people read: the notebooks, the pages that nbdev and Pandoc make of them, how a browser shows them, and the built site where `quarto` is on the PATH.
`python .ci/site.py` runs all and prints counts; each check returns the list of faults that it found."""

import ast, configparser, contextlib, html, json, os, re, shutil, subprocess, sys, tempfile, threading, time
from functools import cached_property, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote
import yaml

ROOT = Path(__file__).resolve().parent.parent
NO_QUARTO = 'the site was not rendered: quarto is not on the PATH'
NO_CHROMIUM = 'the pages were not opened: chromium is not on the PATH'
WIDTHS = dict(phone=390, desktop=1280)
RULES_OFF = {}  # axe rule -> why it is off
MACHINE = re.compile(
    r'(?<![\w.])/(?:root|home(?!/(?:me|ann)/)|work|tmp)\b|site-packages|\b[A-Z]:\\+(?!(?:me|ann)\\)\w'
)  # /home/me and /home/ann are made up, for examples
DEBRIS = re.compile(r'\d+%\||\dit/s|s/it\]|Warning:|^Traceback|\x1b\[|\r', re.M)

# ---- a notebook as it lies in nbs/


def read(path):
    return json.loads(Path(path).read_text(encoding='utf-8'))


def source(cell):
    return ''.join(cell['source'])


def options(cell):
    return (
        {k: v.strip().strip('"') for k, v in re.findall(r'^#\| *([\w-]+):? *(.*)$', source(cell), re.M)}
        if cell['cell_type'] == 'code'
        else {}
    )


def prose(text):
    return re.sub(r'`[^`\n]*`', '', re.sub(r'^(```|~~~).*?^\1', '', text, flags=re.S | re.M))


def hidden(cell):
    return bool({'hide', 'export', 'exporti', 'default_exp'} & options(cell).keys())


def texts(cell):
    "What a cell says in words: its source, and its outputs without pictures."
    yield 'source', source(cell)
    for o in cell.get('outputs', []):
        yield 'output', ''.join(o.get('text', []))
        for kind, data in o.get('data', {}).items():
            if kind.startswith('text/') or kind == 'image/svg+xml':
                yield 'output', re.sub(r'base64,[\w+/=]+', '', ''.join(data))


def shows(cell):
    "Whether running this cell must leave an output: it prints, or ends in a value."
    if (
        cell['cell_type'] != 'code'
        or hidden(cell)
        or options(cell).get('eval') == 'false'
        or {'slow', 'gpu'} & options(cell).keys()
    ):
        return False
    if re.search(r'^#\| *label: *(fig|tbl)-', source(cell), re.M):
        return True
    code = re.sub(r'^[%!].*$', '', source(cell), flags=re.M)
    if source(cell).startswith('%%') or code.rstrip().endswith(';') or not (body := ast.parse(code).body):
        return False
    calls = [n.value.func for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
    return (
        any(getattr(f, 'id', '') == 'print' for f in calls)
        or isinstance(body[-1], ast.Expr)
        and not isinstance(body[-1].value, (ast.Call, ast.Constant))
    )


def mixes_imports(cell):
    "Whether nbdev would warn that imports stand beside other code, and then run both."
    opts = options(cell)
    if (
        cell['cell_type'] != 'code'
        or {'export', 'exporti', 'exports', 'exec_doc'} & opts.keys()
        or opts.get('eval') == 'false'
    ):
        return False
    try:
        kinds = {type(node) for node in ast.walk(ast.parse(source(cell)))}
    except SyntaxError:  # a cell of shell lines or magics
        return False
    return bool(kinds & {ast.Import, ast.ImportFrom}) and bool(kinds & {ast.Expr, ast.Assign})


def check_notebook(nb):
    "Title cell, outputs, headings, alt texts, machine paths, labels, module."
    faults, level, seen = [], 1, set()
    add = lambda cell, what: faults.append(f"cell {cell.get('id')}: {what}")
    if (
        not nb['cells']
        or nb['cells'][0]['cell_type'] != 'markdown'
        or not re.fullmatch(r'# \S.*\n\n> \S.*\n?', source(nb['cells'][0]))
    ):
        faults.append('the first cell must hold a title line, an empty line, a blurb line and nothing else')
    exports = [c for c in nb['cells'] if {'export', 'exporti'} & options(c).keys()]
    if exports and not any('default_exp' in options(c) for c in nb['cells']):
        add(exports[0], 'is exported, but no default_exp says where to')
    for i, cell in enumerate(nb['cells']):
        src, opts = source(cell), options(cell)
        if cell['cell_type'] == 'markdown':
            for h in re.findall(r'^(#+) ', prose(src), re.M):
                if i and (len(h) == 1 or len(h) > level + 1):
                    add(cell, f'a heading of level {len(h)} follows one of level {level}')
                level = len(h)
            if re.search(r'!\[\s*\]\(|<img(?![^>]*\balt=)', prose(src)):
                add(cell, 'a picture without alt text')
        if exports and mixes_imports(cell):
            add(
                cell,
                'imports beside other code: nbdev runs such a cell when it makes the page; put them in a cell of their own',
            )
        if shows(cell) and not cell['outputs']:
            add(cell, 'its output is not there: run it')
        if label := opts.get('label', ''):
            if label in seen:
                add(cell, f'label {label} twice on this page')
            if label.startswith('fig-') and not (opts.get('fig-alt') and opts.get('fig-cap')):
                add(cell, f'{label} without fig-alt or fig-cap')
            seen.add(label)
        for o in cell.get('outputs', []):
            if o['output_type'] == 'error':
                add(cell, f"error {o.get('ename')}")
            if o.get('name') == 'stderr':
                add(cell, 'a stream of stderr: ' + ''.join(o['text'])[:80])
            if (
                any(k.startswith('image/') for k in o.get('data', {}))
                and not hidden(cell)
                and not label
                and not opts.get('fig-alt')
            ):
                add(cell, 'a picture without fig-alt')
        for where, text in texts(cell):
            if m := MACHINE.search(text):
                add(cell, f'{where} with a path of a machine: {text[max(0, m.start() - 30) : m.end() + 30]!r}')
            if where == 'output' and (m := DEBRIS.search(text)):
                add(cell, f'output with {text[max(0, m.start() - 30) : m.end() + 30]!r}')
    return faults


# ---- pages: what nbdev makes before Quarto, parsed by Pandoc

PROCESS = '''
import contextlib, io, json, sys, traceback, warnings
from pathlib import Path
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import _proc_file
from nbdev.serve_drv import main
refresh_quarto_yml()
faults = {}
for f in [*sorted(nbglob('nbs', func=Path, file_glob='', file_re='')), Path('nbs/_quarto.yml')]: # as proc_nbs does
    job, said, found = _proc_file(f, Path('_proc'), Path('nbs')), io.StringIO(), []
    if not job: continue
    with warnings.catch_warnings(record=True) as ws, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter('default')
        warnings.filterwarnings('ignore', category=DeprecationWarning); warnings.filterwarnings('ignore', category=FutureWarning)
        try: main(job)
        except Exception as e: found.append(f'nbdev cannot process it: {e} ({e.__cause__!r})')
    faults[f.stem] = found + [f'nbdev warns: {w.message}' for w in ws] + [f'nbdev prints: {said.getvalue()[:500]}']*bool(said.getvalue().strip())
Path('_proc/faults.json').write_text(json.dumps(faults))
'''


def copied(to, root=ROOT):
    "The project in a folder of its own, so that nothing here is written to."
    skip = shutil.ignore_patterns(
        '.git', '.venv', 'runs', '_docs', '_proc', '*.egg-info', '__pycache__', '.*cache', '.hypothesis'
    )
    return shutil.copytree(root, Path(to) / 'site', symlinks=True, ignore=skip)


def quiet_env(copy):
    return dict(
        os.environ,
        PYTHONPATH=str(copy),
        PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        HF_HUB_OFFLINE='1',
        TOKENIZERS_PARALLELISM='false',
        MPLBACKEND='agg',
    )


class Tags(HTMLParser):
    "Ids and links of a piece of html."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.no_alt = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        self.links += [a[k] for k in ('href', 'src') if a.get(k)]
        if tag == 'img' and 'alt' not in a:
            self.no_alt.append(a.get('src', '')[:40])


def pandoc(text, fmt='markdown'):
    "Pandoc's tree of a text, and what it warned of."
    import pypandoc

    done = subprocess.run(
        [pypandoc.get_pandoc_path(), '-f', fmt, '-t', 'json'],
        input=text,
        capture_output=True,
        text=True,
        encoding='utf-8',
    )
    return json.loads(done.stdout or '{"meta": {}, "blocks": []}'), done.stderr.strip()


def nodes(x):
    if isinstance(x, dict) and 't' in x:
        yield x
    for o in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
        yield from nodes(o)


def html_name(stem):
    return re.sub(r'^\d+[a-z0-9]*_', '', stem.lower()) + '.html'  # as nbdev names it


def words(x):
    return ''.join(
        (
            n['c']
            if n['t'] == 'Str'
            else ' '
            if n['t'] in ('Space', 'SoftBreak')
            else n['c'][1]
            if n['t'] == 'Code'
            else ''
        )
        for n in nodes(x)
    )


class Page:
    "One processed notebook: its markdown, Pandoc's tree of it, ids, links and references."

    def __init__(self, nb):
        self.nb, parts = nb, []
        for cell in nb['cells']:
            if cell['cell_type'] != 'code':
                parts.append(source(cell))
                continue
            opts, code = options(cell), re.sub(r'^#\|.*\n?', '', source(cell), flags=re.M)
            asis, outs = opts.get('output') == 'asis', []
            for o in cell.get('outputs', []):
                data = {k: ''.join(v) for k, v in o.get('data', {}).items() if isinstance(v, (str, list))}
                if 'text/markdown' in data and 'text/html' not in data:
                    outs.append(data['text/markdown'])
                elif 'text/html' in data:
                    outs.append(f"`````{{=html}}\n{data['text/html']}\n`````")
            box = (
                ['\n\n'.join(outs)]
                if asis
                else [
                    f"::: {{{'#' + opts['label'] + ' ' if 'label' in opts else ''}.cell}}",
                    *([f'`````python\n{code}\n`````'] if opts.get('echo') != 'false' else []),
                    *outs,
                    ':::',
                ]
            )
            parts += box
        self.markdown = '\n\n'.join(parts)
        self.tree, self.warned = pandoc(self.markdown)
        self.nodes = list(nodes(self.tree['blocks']))
        self.meta = {k: words(v) for k, v in self.tree['meta'].items()}
        self.html = [Tags(n['c'][1]) for n in self.nodes if n['t'] in ('RawBlock', 'RawInline') and n['c'][0] == 'html']
        self.headings = [(n['c'][0], words(n['c'][2]), n['c'][1][0]) for n in self.nodes if n['t'] == 'Header']
        attrs = [
            n['c'][1] if n['t'] == 'Header' else n['c'][0]
            for n in self.nodes
            if n['t'] in ('Header', 'Div', 'Span', 'CodeBlock', 'Code', 'Link', 'Image', 'Table', 'Figure')
        ]
        self.ids = (
            {a[0] for a in attrs if a[0]}
            | set(re.findall(r'\{#([\w:.-]+)', prose(self.markdown)))
            | {i for t in self.html for i in t.ids}
        )
        self.links = [n['c'][2][0] for n in self.nodes if n['t'] in ('Link', 'Image')] + [
            l for t in self.html for l in t.links
        ]
        self.cites = {c['citationId'] for n in self.nodes if n['t'] == 'Cite' for c in n['c'][0]}


CROSSREF = re.compile(r'(fig|tbl|eq|sec|lst|tip|nte|wrn|imp|cau|thm)-')


class Site:
    "All pages of a copy of the project, processed by nbdev in a process of its own."

    def __init__(self, copy):
        self.root, self.nbs, self.proc = Path(copy), Path(copy) / 'nbs', Path(copy) / '_proc'
        cfg = configparser.ConfigParser(delimiters=['='])
        cfg.read(self.root / 'settings.ini', encoding='utf-8')
        self.cfg = cfg['DEFAULT']
        self.own = self.cfg['doc_host'] + self.cfg['doc_baseurl'] + '/'  # where the site will lie
        done = subprocess.run(
            [sys.executable, '-c', PROCESS], cwd=self.root, capture_output=True, text=True, env=quiet_env(self.root)
        )
        if done.returncode:
            raise RuntimeError(f'nbdev cannot process the notebooks:\n{done.stderr[-2000:]}')
        self.said = read(self.proc / 'faults.json')
        self.names = [p.stem for p in sorted(self.nbs.glob('*.ipynb'))]
        self.yml = yaml.safe_load((self.root / '_quarto.yml').read_text(encoding='utf-8'))

    @cached_property
    def pages(self):
        return {n: Page(read(self.proc / f'{n}.ipynb')) for n in self.names if (self.proc / f'{n}.ipynb').exists()}

    @cached_property
    def outputs(self):
        return {html_name(n): n for n in self.names}

    @cached_property
    def keys(self):
        bibs = self.yml.get('bibliography', [])
        return {
            k
            for b in ([bibs] if isinstance(bibs, str) else bibs)
            if (self.nbs / b).exists()
            for k in re.findall(r'^\s*@\w+\s*\{\s*([^,\s]+)', (self.nbs / b).read_text(encoding='utf-8'), re.M)
        }

    def dead(self, url, page):
        "Why the link `url` of `page` leads nowhere; None where it leads somewhere, or out of the site."
        repo = f"{self.cfg['git_url']}/blob/{self.cfg['branch']}/"
        if url.startswith(repo):
            return (
                None if (self.root / unquote(url[len(repo) :].split('#')[0])).exists() else 'not a file of the project'
            )
        if url.startswith(self.own):
            url = url[len(self.own) :] or 'index.html'
        elif re.match(r'[a-z][a-z+.-]*:|//', url) or url == '#':
            return None
        path, _, anchor = url.partition('#')
        path = unquote(path.split('?')[0])
        name = (
            page
            if not path
            else self.outputs.get(path, Path(path).stem)
            if path.endswith(('.html', '.ipynb'))
            else None
        )
        if (
            path.endswith('.ipynb')
            and not (self.nbs / path).exists()
            or path.endswith('.html')
            and path not in self.outputs
            and not (self.nbs / path).exists()
        ):
            return 'no such page'
        if name is None or name not in self.names:
            return (
                None
                if (self.proc / path).resolve().is_relative_to(self.proc.resolve()) and (self.proc / path).exists()
                else 'no such file among the pages'
            )
        return (
            f'no {anchor} on {name}'
            if anchor and name in self.pages and unquote(anchor) not in self.pages[name].ids
            else None
        )

    def check_page(self, name):
        "What nbdev said, lost cells, front matter, headings, references, citations, links."
        nb, page = read(self.nbs / f'{name}.ipynb'), self.pages.get(name)
        faults = list(self.said.get(name, []))
        if page is None:
            return faults or ['nbdev made no page of it']
        kept = {c['id'] for c in page.nb['cells']}
        lost = [
            c['id']
            for c in nb['cells'][1:]
            if c['id'] not in kept and not hidden(c) and source(c).strip() and not source(c).strip().endswith(' -')
        ]
        faults += [f'cell {c} is not on the page' for c in lost]
        title, blurb = (re.findall(r'^[#>] (.*\S)', source(nb['cells'][0]), re.M) + ['', ''])[:2]
        plain = lambda s: re.sub(r'[\W_]+', '', s)
        for k, v in dict(title=title, description=blurb).items():
            if plain(page.meta.get(k, '')) != plain(v):
                faults.append(f'the {k} of the page is {page.meta.get(k)!r}, not {v!r}')
        if page.warned:
            faults.append(f'Pandoc warns: {page.warned[:500]}')
        for (a, _, _), (b, text, _) in zip([(1, '', '')] + page.headings, page.headings):
            if b == 1 or b > a + 1:
                faults.append(f'heading {text!r} has level {b} after level {a}')
        coded = [
            n['c'][1] for n in page.nodes if n['t'] in ('CodeBlock', 'Code') and re.search(r'\]\(https?://', n['c'][1])
        ]
        faults += [f'a link written out in code, one of {len(coded)}: {c[:300]!r}' for c in coded[:1]]
        faults += [
            f'a link inside a link: {l}'
            for c in page.nb['cells']
            for t in (source(c), *(''.join(o.get('data', {}).get('text/markdown', '')) for o in c.get('outputs', [])))
            for l in re.findall(r'\[\[`[^`]+`\]\(\S+', t)
        ]
        want = sum(
            len(re.findall(r'^#+ \S', prose(source(c)), re.M)) for c in page.nb['cells'] if c['cell_type'] == 'markdown'
        )
        if len(page.headings) < want:
            faults.append(f'{want} headings in the cells, {len(page.headings)} on the page')
        for c in sorted(page.cites):
            if CROSSREF.match(c):
                if c not in page.ids:
                    faults.append(f'@{c} has no label on this page')
            elif c not in self.keys:
                faults.append(f'@{c} is not in the bibliography')
        faults += [f'{u} is dead: {why}' for u in dict.fromkeys(page.links) if (why := self.dead(u, name))]
        return faults + [f'picture {s} without alt text' for t in page.html for s in t.no_alt]

    def check_navigation(self):
        "Everything that _quarto.yml and sidebar.yml name exists; the sidebar lists each page once."
        faults, side = [], yaml.safe_load((self.nbs / 'sidebar.yml').read_text(encoding='utf-8'))

        def entries(x, key=''):
            if isinstance(x, dict):
                for k, v in x.items():
                    yield from entries(v, k)
            elif isinstance(x, list):
                for o in x:
                    yield from entries(o, key)
            elif isinstance(x, str) and key in FILES:
                yield key, x

        listed = [Path(t).stem for _, t in entries(side) if t.endswith('.ipynb')]
        faults += [f'sidebar.yml lists {n} {listed.count(n)} times' for n in self.names if listed.count(n) != 1]
        for k, t in [*entries(side), *entries(self.yml)]:
            if k == 'contents' and not re.search(r'\.\w+$', t):
                continue
            if why := self.dead(t, None):
                faults.append(f'{k}: {t}: {why}')
        link = self.nbs / '_quarto.yml'
        if not link.is_symlink() or link.resolve() != (self.root / '_quarto.yml').resolve():
            faults.append('nbs/_quarto.yml must be a symbolic link to the one above')
        faults += [
            f'resources: {t}: no such file among the pages'
            for t in self.yml['project'].get('resources', [])
            if not any(self.proc.glob(t))
        ]
        return faults + [
            f'{n} and {self.outputs[o]} both make {o}' for n in self.names if self.outputs[o := html_name(n)] != n
        ]

    def check_readme(self):
        "Files and headings that README.md links to."
        tree, warned = pandoc((self.root / 'README.md').read_text(encoding='utf-8'), 'gfm')
        every = list(nodes(tree['blocks']))
        ids, urls = (
            {n['c'][1][0] for n in every if n['t'] == 'Header'},
            [n['c'][2][0] for n in every if n['t'] in ('Link', 'Image')],
        )
        urls += [l for n in every if n['t'] in ('RawBlock', 'RawInline') for l in Tags(n['c'][1]).links]
        faults = [f'Pandoc warns: {warned}'] * bool(warned)
        for u in urls:
            if u.startswith('#'):
                faults += [f'README.md: no heading {u}'] * (u[1:] not in ids)
            elif re.match(r'[a-z]+:', u):
                faults += [f'README.md: {u}: {why}' for why in [self.dead(u, 'index')] if why]
            elif not (self.root / unquote(u.split('#')[0])).exists():
                faults.append(f'README.md: {u} is not a file of the project')
        return faults

    def render(self, name):
        "The page as html by nbconvert, beside the processed notebooks, with the styles of the site."
        import nbformat
        from nbconvert import HTMLExporter

        nb, page = nbformat.from_dict(read(self.proc / f'{name}.ipynb')), self.pages[name]
        nb.cells, nb.metadata.language_info = (
            [c for c in nb.cells if c.cell_type != 'raw'],
            dict(name='text', pygments_lexer='text'),
        )  # colours of code are Quarto's affair
        for c in nb.cells:
            c.source, opts = source(c), options(c)
            if c.cell_type != 'code':
                continue
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
            if opts.get('echo') == 'false':
                c.metadata.transient = dict(remove_source=True)
            for o in c.outputs:
                o.update(
                    {k: ''.join(o[k]) for k in ('text',) if k in o},
                    data={k: ''.join(v) if isinstance(v, list) else v for k, v in o.get('data', {}).items()},
                )
                if not o.data:
                    del o['data']
                for kind in ('image/png', 'image/svg+xml'):
                    o.setdefault('metadata', {})[kind] = dict(alt=opts.get('fig-alt'))
        body, _ = HTMLExporter(
            template_name='basic', exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True
        ).from_notebook_node(nb)
        styles = ''.join((self.proc / f).read_text(encoding='utf-8') for f in _listed(self.yml, 'css'))
        after = ''.join((self.proc / f).read_text(encoding='utf-8') for f in _listed(self.yml, 'include-after-body'))
        out = self.proc / f'{name}.html'
        out.write_text(
            PAGE.format(
                title=html.escape(page.meta['title']),
                blurb=html.escape(page.meta['description']),
                styles=styles,
                body=body,
                after=after,
            ),
            encoding='utf-8',
        )
        return out


FILES = (
    'contents',
    'href',
    'file',
    'css',
    'bibliography',
    'csl',
    'favicon',
    'logo',
    'image',
    'include-after-body',
    'include-in-header',
    'include-before-body',
    'metadata-files',
)
PAGE = '''<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>body {{ margin: 1rem auto; padding: 0 1rem; max-width: 60rem; font-family: sans-serif }}\n{styles}</style></head>
<body><main><h1>{title}</h1><p>{blurb}</p>{body}</main>{after}</body></html>'''


def _listed(yml, key):
    at = yml['format']['html'].get(key, [])
    return [at] if isinstance(at, str) else at


# ---- a browser


class Browser:
    "Headless Chromium with one page, which is used again: `look` says what is wrong with a page at both widths."

    args = (
        '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking'
        ' --disable-component-update --disable-sync'.split()
    )

    def __enter__(self):
        import axe_playwright_python
        from playwright.sync_api import sync_playwright

        self.axe, self.rules = (
            (Path(axe_playwright_python.__file__).parent / 'axe.min.js').read_text(encoding='utf-8'),
            set(),
        )
        self.play = sync_playwright().start()
        self.chromium = self.play.chromium.launch(
            executable_path=shutil.which('chromium'), headless=True, args=self.args
        )
        self.page, self.said = self.chromium.new_page(), []
        self.page.set_default_timeout(120_000)
        self.page.on('console', lambda m: m.type == 'error' and self.said.append(f'console: {m.text}'))
        self.page.on('pageerror', lambda e: self.said.append(f'script error: {e}'))
        self.page.on('requestfailed', lambda r: self.said.append(f'not loaded: {r.url[:120]}'))
        return self

    def __exit__(self, *_):
        self.chromium.close()
        self.play.stop()

    def look(self, page, widths=WIDTHS):
        "What is wrong with a page, a file or an address, at each width."
        faults, url = [], page if isinstance(page, str) else page.resolve().as_uri()
        for name, width in widths.items():
            self.said.clear()
            self.page.set_viewport_size(dict(width=width, height=900))
            self.page.goto(url, timeout=120_000)
            faults += [f'{name}: {s}' for s in self.said]
            wide = self.page.evaluate(
                '''() => { const w = document.documentElement.clientWidth, out = e => { for (e = e.parentElement; e && e !== document.body; e = e.parentElement) if (getComputedStyle(e).overflowX !== 'visible') return false; return true };
                return document.documentElement.scrollWidth <= w ? [] : [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > w + 1 && out(e)).slice(0, 3).map(e => e.outerHTML.slice(0, 120)).concat('') }'''
            )
            if wide:
                faults.append(f"{name}: the page scrolls sideways: {' | '.join(wide)}")
            self.page.evaluate(self.axe)
            found = self.page.evaluate(
                'off => axe.run(document, {rules: off}).then(r => ({run: [...r.passes, ...r.violations,'
                ' ...r.incomplete].map(o => o.id), bad: r.violations.map(o => [o.id, o.impact, o.help, o.nodes.map(n =>'
                ' n.target.join(" ") + ": " + n.html.slice(0, 120))])}))',
                {r: dict(enabled=False) for r in RULES_OFF},
            )
            self.rules |= set(found['run'])
            faults += [
                f'{name}: axe {id} ({impact}): {why}: {len(where)} times, first {where[0]}'
                for id, impact, why, where in found['bad']
                if impact in ('serious', 'critical')
            ]
        return faults


# ---- the site that Quarto builds


def log_faults(log):
    "Lines of a Quarto or nbdev log that warn, fail or leave a reference open."
    bad = re.compile(
        r'\b(warn(ing)?|error)\b|\w+(Warning|Error)\b|unable to resolve|unresolved|not found|Traceback', re.I
    )
    return [line.strip() for line in re.sub(r'\x1b\[[\d;]*m', '', log).splitlines() if bad.search(line)]


def dead_links(docs, own='https://none.example/'):
    "Links and pictures between the html files of a folder that lead nowhere."
    tags = {p.resolve(): Tags(p.read_text(encoding='utf-8')) for p in Path(docs).rglob('*.html')}
    faults = []
    for at, t in tags.items():
        for url in dict.fromkeys(t.links):
            local = (
                f"{os.path.relpath(docs, at.parent)}/{url[len(own) :] or 'index.html'}" if url.startswith(own) else url
            )
            if re.match(r'[a-z][a-z+.-]*:|//', local) or local == '#':
                continue
            path, _, anchor = local.partition('#')
            to = (at.parent / unquote(path.split('?')[0])).resolve() if path else at
            if to.is_dir():
                to /= 'index.html'
            if not to.exists():
                faults.append(f'{at.name}: {url}: no such file')
            elif anchor and to in tags and unquote(anchor) not in tags[to].ids:
                faults.append(f'{at.name}: {url}: no such place on the page')
    return faults


def build(copy):
    "Run `nbdev_docs` on a copy of the project: faults of its log, and the folder of the site."
    done = subprocess.run(
        [str(Path(sys.executable).parent / 'nbdev_docs')],
        cwd=copy,
        capture_output=True,
        text=True,
        env=quiet_env(copy),
        stdin=subprocess.DEVNULL,
    )
    faults = log_faults(done.stdout + done.stderr) + [f'nbdev_docs ended with {done.returncode}'] * bool(
        done.returncode
    )
    return faults + ['nbdev_docs made no page'] * (not (Path(copy) / '_docs/index.html').exists()), Path(copy) / '_docs'


@contextlib.contextmanager
def served(folder):
    "A folder at an address of this machine: scripts of a site may not read files by themselves."
    quiet = type('Quiet', (SimpleHTTPRequestHandler,), dict(log_message=lambda *_: None))
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def check_built(copy, browser, own):
    faults, docs = build(copy)
    if not docs.exists():
        return faults
    with served(docs) as at:
        return (
            faults
            + dead_links(docs, own)
            + [
                f'{p.name}: {f}'
                for p in sorted(docs.rglob('*.html'))
                if '<html' in p.read_text(encoding='utf-8')
                for f in browser.look(f'{at}/{p.relative_to(docs).as_posix()}')
            ]
        )


def main():
    start, faults = time.time(), []
    with tempfile.TemporaryDirectory() as d, contextlib.ExitStack() as stack:
        site = Site(copied(d))
        browser = stack.enter_context(Browser()) if shutil.which('chromium') else None
        faults += site.check_navigation() + site.check_readme()
        for n in site.names:
            found = check_notebook(read(site.nbs / f'{n}.ipynb')) + site.check_page(n)
            if browser and n in site.pages:
                found += browser.look(site.render(n))
            faults += [f'{n}: {f}' for f in found]
        links = sum(len(p.links) for p in site.pages.values())
        print(
            f"{len(site.names)} notebooks, {links} links, {sum(len(p.cites) for p in site.pages.values())} references, "
            + (
                f"{len(WIDTHS) * len(site.pages)} page views, {len(browser.rules)} axe rules"
                if browser
                else NO_CHROMIUM
            )
        )
        if shutil.which('quarto') and browser:
            faults += check_built(copied(Path(d) / 'built'), browser, site.own)
        else:
            print(NO_QUARTO)
    if not browser and os.environ.get('CI') == 'true':
        faults.append(NO_CHROMIUM)
    print(*faults, sep='\n')
    print(f'{len(faults)} faults, {time.time() - start:.0f} s')
    return bool(faults)


if __name__ == '__main__':
    sys.exit(main())
