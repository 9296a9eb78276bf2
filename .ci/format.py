"""Format the code of nbs, tests, benchmarks and .ci at 120 columns; with --check, only say what is not formatted.

Ruff does it. In notebooks the lines of options (`#| export`) are hidden from it: it would write them as comments."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUFF = [str(Path(sys.executable).parent / 'ruff'), 'format', '--config', str(ROOT / 'pyproject.toml')]
FOLDERS = 'tests', 'benchmarks', '.ci'
SHOWN, HIDDEN = re.compile(r'^#\|', re.M), re.compile(r'^#!\|', re.M)  # a comment with ! is left as it is


def changed(cell, old, new):
    "Replace in the source of a code cell."
    if cell['cell_type'] == 'code':
        cell['source'] = old.sub(new, ''.join(cell['source'])).splitlines(keepends=True)


def formatted(path):
    "The text of a notebook as it should be."
    notebook = json.loads(path.read_text(encoding='utf-8'))
    for cell in notebook['cells']:
        changed(cell, SHOWN, '#!|')
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + '\n'
    done = subprocess.run([*RUFF, '--stdin-filename', path.name, '-'], input=text, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'{path.name}: {done.stderr.strip()}')
    notebook = json.loads(done.stdout)
    for cell in notebook['cells']:
        changed(cell, HIDDEN, '#|')
    return json.dumps(notebook, indent=1, ensure_ascii=False) + '\n'


def main(check=False):
    "Names of what was not formatted."
    found = []
    for path in sorted((ROOT / 'nbs').glob('*.ipynb')):
        new = formatted(path)
        if new != path.read_text(encoding='utf-8'):
            found.append(path.relative_to(ROOT))
            if not check:
                path.write_text(new, encoding='utf-8')
    done = subprocess.run([*RUFF, *['--check'] * check, *FOLDERS], cwd=ROOT, capture_output=True, text=True)
    return found, done.stdout.strip() if check and done.returncode else ''


if __name__ == '__main__':
    found, rest = main(check := '--check' in sys.argv)
    print(*found, *rest.splitlines(), sep='\n')
    sys.exit(bool(check and (found or rest)))
