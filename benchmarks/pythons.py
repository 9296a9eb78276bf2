"""Does the wheel install and run on other Pythons?

For each: a virtual environment, the wheel with its requirements, and the lab's way from scores to a table in an empty
folder.

    python benchmarks/pythons.py --python ~/.pyenv/versions/3.1[123]*/bin/python --at /tmp/envs
        --out act/results/pythons.json

An environment that is already in the folder is used as it is, so that torch can be installed there first. PyPI must be
reachable; remove the folder afterwards.
"""

import argparse, hashlib, json, os, subprocess, sys, tempfile, time
from pathlib import Path
from act.kit.records import provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
WAY = '''act_localize --target lab/maths-en --donor lab/base --ability lab/science-zh --out scores.safetensors
act_mask --scores scores.safetensors --p 0.1 --rank module --out mask.safetensors
act_transfer --target lab/maths-en --donor lab/base --mask mask.safetensors --out recovered
act_evaluate --model recovered --ability lab/science-zh --n 40 --out recovered.json'''
LIBS = 'torch transformers datasets accelerate peft safetensors lm-eval numpy'.split()
ASK = (
    'import json, sys, act, importlib.metadata as m; print(json.dumps([sys.version.split()[0], act.__file__, {o:'
    f' m.version(o) for o in {LIBS}}}]))'
)


def run(*args, env=None, cwd=None):
    done = subprocess.run(
        [str(a) for a in args], capture_output=True, text=True, cwd=cwd, env=env, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, args))}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done


def tried(python, wheel, at):
    "What one Python did: its version, those of the libraries, seconds of each command, their standard error."
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(
        HF_HUB_OFFLINE='1', PYTHONWARNINGS='default'
    )
    version = run(python, '-c', 'import sys; print(sys.version.split()[0])', env=env).stdout.strip()
    bin = at / version / 'bin'
    if not bin.exists():
        run(python, '-m', 'venv', at / version, env=env)
    run(bin / 'python', '-m', 'pip', 'install', '--quiet', wheel, env=env)
    run(bin / 'python', '-m', 'pip', 'install', '--quiet', '--no-deps', '--force-reinstall', wheel, env=env)
    with tempfile.TemporaryDirectory() as d:
        version, where, libs = json.loads(run(bin / 'python', '-c', ASK, env=env, cwd=d).stdout)
        assert Path(where).is_relative_to(at.resolve()), where
        seconds, said = {}, []
        for line in WAY.splitlines():
            name, *args = line.split()
            start = time.time()
            said += run(bin / name, *args, env=env, cwd=d).stderr.splitlines()
            seconds[name] = round(time.time() - start, 1)
        mask = hashlib.sha256(
            run(
                bin / 'python',
                '-c',
                "from act.masks import ChannelMask; m = ChannelMask.load('mask.safetensors'); print({p: m[p].tolist()"
                " for p in m.map.paths})",
                env=env,
                cwd=d,
            ).stdout.encode()
        ).hexdigest()
    return dict(
        python=version,
        versions=libs,
        seconds=seconds,
        warnings=[l for l in said if 'Warning' in l and '/act/' in l],
        mask=mask,
    )


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--python', nargs='+', required=True, help='interpreters')
    ap.add_argument('--at', required=True, help='folder for the environments')
    ap.add_argument('--out', required=True, help='result file to write')
    args = ap.parse_args()
    at = Path(args.at).resolve()
    with tempfile.TemporaryDirectory() as d:
        run('git', 'clone', '--quiet', ROOT, f'{d}/act')  # the committed revision
        run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '-w', d, f'{d}/act')
        rows = []
        for python in args.python:
            rows.append(tried(python, next(Path(d).glob('*.whl')), at))
            print(rows[-1], file=sys.stderr)
    write_json(dict(format='act-pythons-1', commands=WAY.splitlines(), rows=rows, **provenance()), args.out)
