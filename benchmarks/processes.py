"""How far results depend on the number of processes.

Fine-tuning alone, data-parallel and spread (FSDP); evaluation alone and shared.

    python benchmarks/processes.py --out processes.json [--steps 30]

All work is the lab's, on CPUs. The same 8 items make a step: 8 in one process, or 4 in each of two.
"""

import argparse, json, os, subprocess, sys, tempfile
from pathlib import Path
from safetensors import safe_open
from act.kit.records import provenance, write_json

BIN = Path(sys.executable).parent
LAUNCH = {
    'one process': [sys.executable],
    'two, data-parallel': [BIN / 'torchrun', '--standalone', '--nproc_per_node=2'],
    'two, spread': [
        BIN / 'accelerate',
        'launch',
        '--use_fsdp',
        '--fsdp_version=2',
        '--num_processes=2',
        '--num_machines=1',
        '--mixed_precision=no',
        '--dynamo_backend=no',
        '--main_process_port=0',
    ],
}
TUNE = """
import sys, torch
from safetensors.torch import save_file
from act.sources import load_ability
from act.loading import load_model
from act.kit.processes import processes
from act.finetune import finetune
model, tok = load_model('lab/maths-en', dtype='float32')
ability, each = load_ability('lab/science-zh', 'sft'), 8 // processes()[1]
report = finetune(model, ability, tok, steps=int(sys.argv[2]), batch_size=each, lr=3e-4, progress=False)
if not processes()[0]:
    weights = {k: p.detach() for k, p in report.model.named_parameters()}
    save_file(weights, sys.argv[1], dict(loss=str(report.losses[-1])))
"""
SCORE = """
import sys, torch
from safetensors.torch import save_file
from act.sources import load_ability
from act.loading import load_model
from act.kit.processes import processes
from act.evaluate import evaluate
out, abilities = {}, [load_ability(f'lab/{a}') for a in ('science-zh', 'multiplication-en')]
for dtype in ('float32', 'bfloat16'):
    model, tok = load_model('lab/maths-en', dtype=dtype)
    for size in (64, 16):
        result = evaluate(model, abilities, tok, batch_size=size, progress=False)
        out[f'{dtype} {size}'] = torch.tensor(result.items.loglik.values)
if not processes()[0]: save_file(out, sys.argv[1])
"""


def tensors(f):
    with safe_open(f, 'pt') as s:
        return {k: s.get_tensor(k) for k in s.keys()}, s.metadata() or {}


def far(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


def main(out, steps):
    from act.loading import load_model

    tuned, scored = {}, {}
    with tempfile.TemporaryDirectory() as d:

        def run(how, code, *args):
            (Path(d) / 'job.py').write_text(code)
            file = f'{d}/{len(tuned)}{len(scored)}.safetensors'
            subprocess.run(
                [str(o) for o in (*LAUNCH[how], f'{d}/job.py', file, *args)],
                check=True,
                env=dict(os.environ, OMP_NUM_THREADS='1'),
            )
            return tensors(file)

        for how in LAUNCH:
            tuned[how] = run(how, TUNE, steps)
        for how in list(LAUNCH)[:2]:
            scored[how] = run(how, SCORE)[0]
    before, (alone, _) = dict(load_model('lab/maths-en', dtype='float32')[0].named_parameters()), tuned['one process']
    one, two = scored.values()
    parallel, count = tuned['two, data-parallel'][0], sum(p.numel() for p in alone.values())
    rows = [
        dict(
            processes=k,
            last_loss=float(m['loss']),
            largest_move=far(before, t),
            from_one_process=far(alone, t),
            from_data_parallel=far(parallel, t),
            other_in_bf16=sum(int((alone[n].bfloat16() != t[n].bfloat16()).sum()) for n in t) / count,
        )
        for k, (t, m) in tuned.items()
    ]
    evaluation = {
        k.split()[0]: dict(
            items=len(one[k]),
            one_or_two_processes=far({k: one[k]}, {k: two[k]}),
            batch_of_64_or_16=far({k: one[k]}, {k: one[k.replace('64', '16')]}),
        )
        for k in one
        if k.endswith('64')
    }
    write_json(provenance(format='act-processes-1', steps=steps, finetune=rows, evaluate=evaluation), out)
    print(json.dumps([rows, evaluation], indent=1))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', required=True)
    p.add_argument('--steps', type=int, default=30)
    main(**vars(p.parse_args()))
