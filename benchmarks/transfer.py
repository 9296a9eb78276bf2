"""Streamed transfer and delta files beside `cp -r` and mergekit's task arithmetic.

They run on made-up checkpoints of a real shape, in turn and several times.

    python benchmarks/transfer.py --folder /somewhere/with/12/GB --out transfer.json [--layers 28] [--rounds 5]

Every tool runs as a process of its own, interpreter start included; peak memory is its largest resident set.
"""

import argparse, json, os, shutil, statistics, subprocess, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config
from act.checkpoints import Checkpoint
from act.fingerprints import fingerprint
from act.loading import channels_of
from act.kit.records import provenance, write_json
from act.zoo.lab_training import lab_path
from act.masks import ChannelMask, random_mask

BIN = Path(sys.executable).parent


def make(folder, seed, layers):
    "A checkpoint of Qwen2.5-1.5B's shape (or fewer layers) in bf16, two shards, with the lab's tokenizer."
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype='bfloat16',
        architectures=['Qwen2ForCausalLM'],
    )
    config.save_pretrained(folder)
    with torch.device('meta'):
        shapes = {k: p.shape for k, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    noise, names, where = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0)) * 0.02, list(shapes), {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f'model-{i + 1:05d}-of-00002.safetensors'
        fill = lambda n, j: (
            noise.repeat(-(-n // len(noise)))[:n] * (1 + 0.001 * j) + 0.0005 * seed * (j % 7 + 1)
        ).bfloat16()
        save_file(
            {k: fill(shapes[k].numel(), j).reshape(shapes[k]) for j, k in enumerate(part)},
            folder / file,
            metadata=dict(format='pt'),
        )
        where.update(dict.fromkeys(part, file))
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=where)))
    for f in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(lab_path('base') / f, folder / f)


RUNNER = """import json, os, sys, time
start = time.time()
pid = os.fork()
if not pid:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execv(sys.argv[1], sys.argv[1:])
_, status, use = os.wait4(pid, 0)
print(json.dumps(dict(seconds=round(time.time() - start, 2), peak_mb=round(use.ru_maxrss/1e3), status=status)))"""


def timed(command):
    "Wall seconds and peak resident MB of a process, started from a small one: a peak counts what the parent held."
    done = subprocess.run(
        [sys.executable, '-S', '-c', RUNNER, shutil.which(command[0]), *command[1:]], capture_output=True, text=True
    )
    row = json.loads(done.stdout.splitlines()[-1])
    if row.pop('status'):
        sys.exit(done.stderr[-2000:])
    return row


def summary(v):
    return dict(median=round(statistics.median(v), 3), least=round(min(v), 3), most=round(max(v), 3))


def main(folder, out, layers, rounds):
    folder = Path(folder)
    a, b, mask, recipe = (folder / n for n in ('target', 'donor', 'mask.safetensors', 'mergekit.yaml'))
    for f, seed in ((a, 0), (b, 1)):
        if not f.exists():
            f.mkdir(parents=True)
            make(f, seed, layers)
    cm = channels_of(a)
    m = random_mask(ChannelMask.from_flat(torch.arange(cm.total) < 0.05 * cm.total, cm), 1)
    m.meta.update(target_print=fingerprint(a), donor_print=fingerprint(b))
    m.save(mask)
    recipe.write_text(
        f'merge_method: task_arithmetic\nbase_model: {a}\nmodels:\n  - model: {b}\n    parameters: {{weight:'
        ' 0.5}\ndtype: bfloat16\n'
    )
    result, delta = folder / 'result', folder / 'delta.safetensors'
    pair = ['--target', a, '--donor', b, '--mask', mask, '--lam', '0.5', '--out']
    tools = {
        'cp -r': ['cp', '-r', a, result],
        'act_transfer': [BIN / 'act_transfer', *pair, result],
        'act_delta': [BIN / 'act_delta', *pair, delta],
        'act_apply': [BIN / 'act_apply', '--target', a, '--delta', delta, '--out', result],
        'mergekit-yaml': [BIN / 'mergekit-yaml', recipe, result],
        'import torch': [sys.executable, '-c', 'import torch'],
        'act_transfer --help': [BIN / 'act_transfer', '--help'],
    }
    rows = []
    for r in range(rounds):
        for name, command in tools.items():
            shutil.rmtree(result, ignore_errors=True)
            os.sync()
            rows.append(dict(round=r, tool=name, **timed([str(c) for c in command])))
            print(rows[-1], flush=True)
    shutil.rmtree(result, ignore_errors=True)
    at = lambda name: [r['seconds'] for r in rows if r['tool'] == name]
    ratios = dict(
        to_mergekit=[x / y for x, y in zip(at('act_transfer'), at('mergekit-yaml'))],
        to_cp=[(x - z) / y for x, y, z in zip(at('act_transfer'), at('cp -r'), at('act_transfer --help'))],
        to_limit=[x / (1.5 * y + z) for x, y, z in zip(at('act_transfer'), at('cp -r'), at('act_transfer --help'))],
    )
    table = {k: summary(v) for k, v in ratios.items()}
    peak = lambda name: max(r['peak_mb'] for r in rows if r['tool'] == name)
    table['peak_mb_above_torch'] = {
        t: peak(t) - peak('import torch') for t in ('act_transfer', 'act_delta', 'act_apply', 'mergekit-yaml')
    }
    whole = sum(f.stat().st_size for f in a.glob('*.safetensors'))
    table['delta_share'] = round(delta.stat().st_size / whole, 4)
    table['largest_tensor_mb'] = round(max(t.end - t.start for t in Checkpoint(a).tensors.values()) / 1e6, 1)
    write_json(
        provenance(
            format='act-bench-transfer-1',
            bytes=whole,
            layers=layers,
            channels=m.count,
            total=m.total,
            summary=table,
            rows=rows,
        ),
        out,
    )
    print(json.dumps(table, indent=1))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--folder', required=True)
    p.add_argument('--out', required=True)
    p.add_argument('--layers', type=int, default=28)
    p.add_argument('--rounds', type=int, default=5)
    main(**vars(p.parse_args()))
