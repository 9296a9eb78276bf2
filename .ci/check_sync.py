"Fail when act/ or README.md is out of step with nbs/, a notebook is not clean, or code is not formatted."

import filecmp, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def check():
    "The list of what is out of step."
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d) / ROOT.name
        shutil.copytree(
            ROOT,
            copy,
            ignore=shutil.ignore_patterns(
                '.git', '.venv', 'runs', '_docs', '_proc', '*.egg-info', '__pycache__', '.*cache'
            ),
        )
        for f in (copy / 'act').rglob('*.py'):
            if f.name != '__init__.py':
                f.unlink()
        for cmd in ('nbdev_export', 'nbdev_clean'):
            done = subprocess.run([str(BIN / cmd)], cwd=copy, capture_output=True, text=True)
            if done.returncode:
                return [f'{cmd} failed:\n{done.stderr[-2000:]}']
        names = {p.relative_to(r) for r in (ROOT, copy) for pat in ('act/**/*.py', 'nbs/*.ipynb') for p in r.glob(pat)}
        same = lambda n: (ROOT / n).exists() and (copy / n).exists() and filecmp.cmp(ROOT / n, copy / n, shallow=False)
        return [f'{n} is out of step: run nbdev_export and nbdev_clean' for n in sorted(names) if not same(n)]


if __name__ == '__main__':
    stale = check()
    done = subprocess.run([sys.executable, str(ROOT / '.ci/readme.py'), '--check'], capture_output=True, text=True)
    if done.returncode:
        stale.append(done.stderr.strip())
    form = subprocess.run([sys.executable, str(ROOT / '.ci/format.py'), '--check'], capture_output=True, text=True)
    if form.returncode:
        stale.append(f'not formatted, run make format:\n{form.stdout.strip()}{form.stderr.strip()}')
    if stale:
        sys.exit('\n'.join(stale))
    print('act/, README.md and nbs/ are in step; the notebooks are clean, the code is formatted')
