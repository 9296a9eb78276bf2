"""What a newcomer does, on the clock: clone, `make reproduce`, and `make test` if asked; and what these print.

    python benchmarks/newcomer.py --out act/results/newcomer.json [--test]

The clone is of the committed revision, in a folder of its own, with an empty home; pip's cache is empty too. Python
3.11 or later and make must be installed.
Setting up is timed separately: the clone's `make setup` comes first, which `make reproduce` would do by itself.
"""

import argparse, os, re, subprocess, sys, tempfile, time
from pathlib import Path
from act.kit.records import provenance, write_json


def run(name, command, where, home):
    "Wall time and the last lines that a command prints; its messages go to the terminal."
    start = time.time()
    done = subprocess.run(
        command,
        cwd=where,
        stdout=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        env=dict(
            PATH=os.environ['PATH'],
            LANG='C.UTF-8',
            HOME=str(home),
            **{k: v for k, v in os.environ.items() if k.startswith(('PIP_', 'CI'))},
        ),
    )
    seconds = time.time() - start
    print(f'{name}: {seconds:.0f} s, exit code {done.returncode}', file=sys.stderr)
    if done.returncode:
        sys.exit(done.stdout[-4000:])
    text = re.sub(re.escape(str(where)) + r'/?', '', done.stdout)
    return dict(
        command=command if isinstance(command, str) else ' '.join(command),
        seconds=round(seconds, 1),
        output=text.rstrip().split('\n')[-90:],
    )


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--out', required=True, help='result file to write')
    ap.add_argument('--test', action='store_true', help='run make test too')
    args = ap.parse_args()
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as d:
        clone, home = Path(d) / 'act', Path(d) / 'home'
        home.mkdir()
        steps = dict(clone=run('clone', ['git', 'clone', '--quiet', str(root), str(clone)], d, home))
        steps['clone']['command'] = 'git clone'
        for name in ('setup', 'reproduce', *(['test'] if args.test else [])):
            steps[name] = run(name, ['make', name], clone, home)
        revision = subprocess.run(
            ['git', 'rev-parse', '--short=12', 'HEAD'], cwd=clone, capture_output=True, text=True
        ).stdout.strip()
        sizes = {
            n: sum(f.stat().st_size for f in (clone / n).rglob('*') if f.is_file() and not f.is_symlink())
            for n in ('.venv', 'runs')
        }
    write_json(dict(format='act-newcomer-1', steps=steps, bytes=sizes, **{**provenance(), 'git': revision}), args.out)
