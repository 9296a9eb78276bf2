"""What README, guide and commands page say is done as written: by a shell in an empty folder, from an installed wheel.

A line that ends in `# needs the hub`, or a block that begins with `# needs a clone`, is not run here, and says so
to the reader as well.
"""

import ast, email, json, os, re, shlex, shutil, subprocess, sys, zipfile
from pathlib import Path
from types import SimpleNamespace
import pytest
from act.kit import processes
from act.kit.command import options
from act.sources import load_ability
from act.zoo.lab_training import lab_path
from helpers import SCRIPTS, check_call, function

ROOT = Path(__file__).parent.parent
NEEDS = re.compile(r'# needs (a clone|the hub)\b')


def cells(name):
    return json.loads((ROOT / f'nbs/{name}.ipynb').read_text(encoding='utf-8'))['cells']


def source(cell):
    return ''.join(cell['source'])


def blocks(text, language):
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)


def steps(text):
    "(line, what it needs that is not here) of every shell block of a text."
    for block in blocks(text, 'sh'):
        first = NEEDS.match(block)
        for line in block.splitlines():
            needs = first or NEEDS.search(line)
            if line.strip() and not line.startswith('#'):
                yield line, needs and needs[1]


def page(name):
    "(line, what it needs, exit code on the page) of a notebook: its shell blocks, and what its cells give to `sh`."
    for c in cells(name):
        if c['cell_type'] == 'markdown':
            yield from ((*s, 0) for s in steps(source(c)))
        elif shown := re.search(r"^sh\((.*)\)$", source(c), re.M):
            code = re.search(
                r'\(exit code (\d+)\)',
                ''.join(
                    o.get('text', '') if isinstance(o.get('text', ''), str) else ''.join(o['text'])
                    for o in c['outputs']
                ),
            )
            yield ast.literal_eval(shown[1]), None, int(code[1]) if code else 0


PAGES = {
    'README': [(*s, 0) for s in steps((ROOT / 'README.md').read_text(encoding='utf-8'))],
    'guide': [*page('90_guide')],
    'commands': [*page('93_commands')],
}


@pytest.fixture(scope='session')
def installed(tmp_path_factory):
    "This tree's wheel, and a virtual environment with it and the libraries of this one, without the tree."
    at = tmp_path_factory.mktemp('installed')
    kept = shutil.ignore_patterns('.*', 'runs', 'build', 'dist', '_docs', '_proc', '*.egg-info', '__pycache__')
    tree, env = at / 'tree', {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    shutil.copytree(ROOT, tree, ignore=kept)

    def run(*args):
        subprocess.run([str(a) for a in args], check=True, cwd=at, env=env, capture_output=True)

    run(
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--quiet',
        '--no-deps',
        '--no-index',
        '--no-build-isolation',
        '-w',
        at,
        tree,
    )
    shutil.rmtree(tree)
    run(sys.executable, '-m', 'venv', '--without-pip', at / 'venv')
    wheel, python = next(at.glob('*.whl')), at / 'venv/bin/python'
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index', wheel)
    own = next((at / 'venv').glob('lib/python*/site-packages'))
    (own / 'libraries.pth').write_text('\n'.join(p for p in sys.path if p.endswith('-packages')))
    path = os.pathsep.join([str(python.parent), str(Path(sys.executable).parent), env['PATH']])
    return SimpleNamespace(
        wheel=wheel,
        python=python,
        own=own,
        env=env
        | dict(
            PATH=path,
            HF_HUB_OFFLINE='1',
            OMP_NUM_THREADS='1',
            TQDM_DISABLE='1',
            ACT_CACHE=str(at / 'cache'),
            MPLBACKEND='Agg',
        ),
    )


def python(installed, code, where):
    return subprocess.run([installed.python, '-c', code], cwd=where, env=installed.env, capture_output=True, text=True)


# ---- the wheel


@pytest.mark.slow
def test_the_installed_package_is_the_wheels(installed, tmp_path):
    done = python(
        installed,
        'import act, importlib.metadata as m; print(act.__file__, m.distribution("act-transfer").locate_file(""),'
        ' sep="\\n")',
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [Path(l).resolve() for l in done.stdout.splitlines()] == [
        (installed.own / 'act/__init__.py').resolve(),
        installed.own.resolve(),
    ], done.stderr
    assert {f.name for f in (installed.python.parent).glob('act_*')} == {*SCRIPTS, 'act_lm_eval'}


def test_all_data_is_in_the_wheel(installed):
    data = {p.relative_to(ROOT) for p in (ROOT / 'act').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert not [str(p) for p in data if not (installed.own / p).exists()]
    assert any(p.suffix == '.yaml' and 'recipe' in str(p) for p in data)


def test_what_a_package_index_shows(installed):
    with zipfile.ZipFile(installed.wheel) as z:
        meta = email.message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA'))))
    text = meta.get_payload(decode=True).decode()
    links = re.findall(r'\]\(([^)\s]+)\)', text)
    assert len(links) > 30
    assert not [l for l in links if not l.startswith('https://')]
    pictures = re.findall(r'(?:!\[[^\]]*\]\(|<img src=")([^)"\s]+)', text)
    assert len(pictures) == 2
    assert all(
        re.fullmatch(r'https://raw\.githubusercontent\.com/act-companion/act/main/nbs/images/\w+\.(svg|png)', p)
        for p in pictures
    )
    assert all((ROOT / p.split('/main/')[1]).exists() for p in pictures)
    ours = [l for l in links if l.startswith('https://act-companion.github.io/act/')]
    pages = {re.sub(r'^\d+_', '', p.stem) for p in (ROOT / 'nbs').glob('*.ipynb')}
    assert ours
    assert not [l for l in ours if l.split('/act/')[1].split('.html')[0] not in pages]
    assert meta['Description-Content-Type'] == 'text/markdown'
    assert '](nbs/' in (ROOT / 'README.md').read_text(encoding='utf-8')  # which stays as it is


# ---- the pages


def shell(lines):
    "A script that does one line after the other, in one shell, and stops where one ends otherwise than its page says."
    script = ['set -uo pipefail']
    for line, needs, code in lines:
        if not needs:
            script += [
                f'{{ {line}\n}} >>log 2>&1',
                (
                    f'got=$?; [ $got = {code} ] || {{ echo "ended with $got, not {code}: "{shlex.quote(line)} >>log;'
                    ' exit 1; }'
                ),
            ]
    return '\n'.join(script)


GUIDES = {  # other names for the guide's cell of names
    'another pair': dict(
        target='lab/swahili', donor='lab/base', recovered='lab/science-en', retained='lab/arithmetic-sw'
    ),
    'folders and files': dict(target='sorted', donor='first', recovered='sums.jsonl', retained='datos.jsonl'),
}


def guide(names):
    "The guide's code with other names in its one cell of names, and at the end what came out as a line of JSON."
    code = [source(c) for c in cells('90_guide') if c['cell_type'] == 'code']
    given = [i for i, c in enumerate(code) if c.startswith('target, donor = ')]
    assert len(given) == 1
    assert set(names) == {n.id for n in ast.walk(ast.parse(code[given[0]])) if isinstance(n, ast.Name)}
    code[given[0]] = '\n'.join(f'{k} = {v!r}' for k, v in names.items())
    end = (
        'import json\nprint(json.dumps(dict(mask=mask.meta, tried=len(grid), test={n: row(m) for n, m in'
        ' models.items()})))'
    )
    return '\n'.join([*code, end])


def prepared(at, name):
    "What a guide's names name, where they are no lab models."
    if name != 'folders and files':
        return
    for mine, theirs in (('sorted', 'science-es'), ('first', 'base')):
        shutil.copytree(lab_path(theirs), at / mine)
    for mine, theirs in (('sums', 'lab/arithmetic-en'), ('datos', 'lab/science-es')):
        sum(
            (load_ability(theirs, split, 60) for split in ('sft', 'validation', 'test')),
            load_ability(theirs, 'localize', 60),
        ).save(at / f'{mine}.jsonl')


@pytest.fixture(scope='module')
def started(installed, tmp_path_factory):
    "Pages and guides begun all at once, each in an empty folder of its own: name -> (folder, process)."
    at = {name: tmp_path_factory.mktemp(name.replace(' ', '-')) for name in (*PAGES, *GUIDES)}
    for name in GUIDES:
        prepared(at[name], name)
    what = {name: ['bash', '-c', shell(lines)] for name, lines in PAGES.items()} | {
        name: [installed.python, '-c', guide(names)] for name, names in GUIDES.items()
    }
    run = {}
    for name, command in what.items():
        with open(at[name] / 'out', 'w') as out:
            run[name] = subprocess.Popen(command, cwd=at[name], env=installed.env, stdout=out, stderr=out)
    yield {name: (at[name], run[name]) for name in run}
    for p in run.values():
        p.kill()
        p.wait()


@pytest.mark.parametrize('name', PAGES)
@pytest.mark.slow
def test_commands_of_a_page(started, name):
    at, process = started[name]
    code, said = process.wait(), (at / 'log').read_text()
    assert code == 0, said[-3000:]
    done = '\n'.join(l for l, needs, code in PAGES[name] if not needs and not code and '--dry_run' not in l)
    for out in re.findall(r'(?:--out|2?>) (\S+)', done):
        assert (at / out).exists(), out
    rest = re.sub(r'^warning: \d+% of the mask is lm_head .*$', '', said, flags=re.M)  # what the raw ranking is told
    assert not re.search(r'^stopped$|Traceback|warning', rest, re.M | re.I)


@pytest.mark.slow
@pytest.mark.parametrize('name, ability', [('another pair', 'science-en'), ('folders and files', 'sums')])
def test_the_guide_with_other_models(started, name, ability):
    at, process = started[name]
    code, said = process.wait(), (at / 'out').read_text()
    assert code == 0, said[-3000:]
    end = json.loads(said.splitlines()[-1])
    assert end['mask']['ability'] == ability
    assert end['tried'] == 8
    assert [*end['test']] == [
        *('target', 'target + SFT', 'random + SFT', 'activation + SFT', 'attribution', 'attribution + SFT')
    ]
    assert all([*row] == ['retained', 'recovered'] for row in end['test'].values())


def test_nothing_else_in_the_guide_names_models_or_abilities():
    code = [
        source(c)
        for c in cells('90_guide')
        if c['cell_type'] == 'code' and not source(c).startswith('target, donor = ')
    ]
    named = re.sub(r'#\| tbl-cap: .*', '', '\n'.join(code))  # of a recorded table
    lines = '\n'.join(l for l, _, _ in PAGES['guide'] if not re.match('(target|recovered)=', l))
    assert not re.search(r'lab/|maths|science|multiplication', named)
    assert not re.search(r'lab/|maths|science|multiplication', lines)


@pytest.mark.parametrize('name', PAGES)
def test_what_is_not_done_here_is_known_to_the_parsers(name):
    assert any(not needs for _, needs, _ in PAGES[name])
    for line, needs, _ in PAGES[name]:
        if not needs:
            continue
        command = line.split('#')[0].strip()
        if command.startswith('act_'):
            check_call(command)
        elif command.startswith('make '):
            assert (
                subprocess.run(['make', '--dry-run', *command.split()[1:]], cwd=ROOT, capture_output=True).returncode
                == 0
            ), line
        else:
            assert command == 'pip install .', f'{line}: only what needs a clone or the hub may be left out'


def test_commands_in_the_running_text():
    text = (ROOT / 'README.md').read_text(encoding='utf-8') + ''.join(
        source(c) for n in ('90_guide', '93_commands') for c in cells(n) if c['cell_type'] == 'markdown'
    )
    named = re.findall(r'(?<!`)`(act_[^`\n]+)`', text)
    assert len(named) > 10
    for line in named:
        name, *_ = line.split()
        assert name in SCRIPTS, line
        known = {o.name for o in options(function(name))} | {'dry_run', 'version', 'help'}
        assert set(re.findall(r'--(\w+)', line)) <= known, line


@pytest.mark.slow
def test_the_readmes_code(installed, tmp_path):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    code, shown = re.search(r'^```python\n(.*?)^```\n\n```\n(.*?)^```', text, re.M | re.S).groups()
    assert blocks(text, 'python') == [code]
    done = python(installed, code, tmp_path)
    assert (done.returncode, done.stdout) == (0, shown), done.stderr


@pytest.mark.slow
def test_a_copied_notebook_leaves_the_package_alone(installed, tmp_path):
    "Its cells are run where it was copied to: act/ of the checkout, and the installed one, stay as they are."
    shutil.copy(ROOT / 'nbs/00_errors.ipynb', tmp_path)
    before = {p: p.stat().st_mtime_ns for d in (ROOT / 'act', installed.own / 'act') for p in d.glob('*.py')}
    code = '\n'.join(
        source(c)
        for c in json.loads((tmp_path / '00_errors.ipynb').read_text())['cells']
        if c['cell_type'] == 'code' and not source(c).startswith('%')
    )
    done = python(
        installed,
        'from IPython.core.interactiveshell import InteractiveShell\nassert'
        f' InteractiveShell.instance().run_cell({code!r}).success',
        tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for d in (ROOT / 'act', installed.own / 'act') for p in d.glob('*.py')} == before
    assert not (tmp_path / 'act').exists()
    assert not (tmp_path.parent / 'act').exists()


def test_no_notebook_exports():
    for f in (ROOT / 'nbs').glob('*.ipynb'):
        assert not [c['id'] for c in cells(f.stem) if c['cell_type'] == 'code' and 'nbdev_export' in source(c)], f.name


# ---- what other systems say


def test_windows_gets_a_sentence(tmp_path):
    "Without fcntl the package says where it runs, instead of a missing module."
    code = "import sys; sys.modules['fcntl'] = None\ntry: import act.kit.files\nexcept ImportError as e: print(e)"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert 'on Windows, use it inside WSL' in done.stdout
    assert done.returncode == 0


def test_peak_memory_is_in_bytes_everywhere(monkeypatch):
    import builtins

    real, proc = builtins.open, processes.peak_memory()
    assert 1e7 < proc < 1e12

    def no_proc(path, *a, **k):
        if str(path).startswith('/proc'):
            raise FileNotFoundError(path)
        return real(path, *a, **k)

    monkeypatch.setattr(builtins, 'open', no_proc)
    monkeypatch.setattr(processes.resource, 'getrusage', lambda who: SimpleNamespace(ru_maxrss=5000))
    for system, unit in (('linux', 1024), ('darwin', 1)):
        monkeypatch.setattr(processes.sys, 'platform', system)
        assert processes.peak_memory() == 5000 * unit
