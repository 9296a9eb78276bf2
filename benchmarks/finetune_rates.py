"""How far a learning rate takes a model, for rates in thirds of a decade.

Measured are bits per byte, before and after, of what is learned and of unrelated text.

    ACT_DATA=data python benchmarks/finetune_rates.py --out act/results/finetune-rates.json
        [--models lab,smollm2] [--kinds full,lora]

The lab: 50 steps of 16 items, the defaults. SmolLM2-135M: fewer and shorter items, which two cores can do; the settings
are in the file. A second call with the same file adds what it lacks.
"""

import argparse, time
from itertools import product
from pathlib import Path
from act.abilities import Ability, Item
from act.encoding import encode
from act.sources import load_ability
from act.fingerprints import weight_hash
from act.loading import load_model
from act.kit.records import provenance, read_json, write_json
from act.finetune import finetune
from act.finetune_cost import bits_per_byte, neutral_text

RATES = [1e-6, 2.2e-6, 4.6e-6, 1e-5, 2.2e-5, 4.6e-5, 1e-4, 2.2e-4, 4.6e-4, 1e-3, 2.2e-3, 4.6e-3, 1e-2]
LORA = dict(r=8, lora_alpha=16, target_modules='all-linear')
SETTINGS = dict(lab=dict(steps=50, batch_size=16), smollm2=dict(steps=10, batch_size=4, max_length=80))
START = dict(lab='lab/base', smollm2='smollm2')
TOO_FAR = 1.5  # a neutral text that needs this much more ends the way up


def short(ability, tokenizer, n=300):
    "The items with the fewest tokens."
    size = {o: len(e.input_ids) for o, e in zip(ability, encode(ability, tokenizer))}
    return Ability(ability.name, sorted(ability, key=size.get)[:n], f'{ability.source}, the {n} shortest')


def opening(ability):
    "The first sentences of longer texts: 8 words and the next 20."
    words = [f'{o.prompt}{o.answer}'.split(' ') for o in ability]
    return Ability(
        ability.name,
        [Item(' '.join(w[:8]), ' ' + ' '.join(w[8:28])) for w in words],
        f'{ability.source}, 28 words each',
    )


def whole(ability):
    "All of each text but its first word: answers alone a small model may know by heart, to 0 bits."
    texts = [f'{o.prompt}{o.answer}' for o in ability]
    return Ability(
        ability.name,
        [Item(t.split(' ')[0], t[len(t.split(' ')[0]) :]) for t in texts],
        f'{ability.source}, with prompts',
    )


def lab(tok):
    "Facts of chemistry in Chinese and multiplication in English; other English that the lab knows is neutral."
    rest = whole(load_ability('lab/science-en', 'test', 60) + load_ability('lab/arithmetic-en', 'test', 60))
    return rest, {
        a: (load_ability(f'lab/{a}', 'train', 300), load_ability(f'lab/{a}', 'validation', 60))
        for a in ('chemistry-zh', 'multiplication-en')
    }


def smollm2(tok):
    "Worked answers to word problems, and Spanish."
    maths = short(load_ability('gsm8k/en', 'train'), tok), short(load_ability('gsm8k/en', 'validation'), tok, 12)
    spanish = opening(load_ability('xquad-text/es', 'train')), opening(load_ability('xquad-text/es', 'validation')[:12])
    return neutral_text(), {'gsm8k-en': maths, 'xquad-text-es': spanish}


def measure(model, tok, neutral, train, val, **options):
    start, report = time.time(), finetune(model, train, tok, seed=0, progress=False, **options)
    return dict(
        neutral=round(bits_per_byte(report.model, neutral, tok), 4),
        learned=round(bits_per_byte(report.model, val, tok), 4),
        first_loss=round(report.losses[0], 3),
        last_loss=round(report.losses[-1], 3),
        tokens=report.tokens,
        seconds=round(time.time() - start, 1),
    )


def main(out, models, kinds, rates, abilities, **changed):
    record = (
        read_json(out, 'act-finetune-rates-1', 'table of rates', 'benchmarks/finetune_rates.py')
        if Path(out).exists()
        else dict(format='act-finetune-rates-1', runs=[])
    )
    for name in models:
        model, tok = load_model(START[name], dtype='float32')
        neutral, data = globals()[name](tok)
        base = dict(
            model=START[name],
            parameters=sum(p.numel() for p in model.parameters()),
            weights=weight_hash(model),
            neutral_text=dict(name=neutral.source, hash=neutral.hash),
        )
        settings = SETTINGS[name] | {k: v for k, v in changed.items() if v}
        for kind, ability in product(kinds, abilities or data):
            train, val = data[ability]
            before = dict(
                neutral_before=round(bits_per_byte(model, neutral, tok), 4),
                learned_before=round(bits_per_byte(model, val, tok), 4),
            )
            for lr in rates:
                job = base | dict(
                    kind=kind,
                    ability=ability,
                    items=dict(train=train.hash, validation=val.hash),
                    lr=lr,
                    seed=0,
                    **settings,
                )
                if any(job.items() <= r.items() for r in record['runs']):
                    continue
                row = (
                    job
                    | before
                    | measure(model, tok, neutral, train, val, lr=lr, lora=LORA if kind == 'lora' else None, **settings)
                )
                record['runs'].append(row)
                record['provenance'] = provenance(config=dict(settings=SETTINGS, lora=LORA), seed=0)
                write_json(record, out)
                print(
                    name,
                    kind,
                    ability,
                    f"{lr:g}: neutral {row['neutral_before']} -> {row['neutral']}, learned {row['learned_before']} ->"
                    f" {row['learned']}, {row['seconds']} s",
                    flush=True,
                )
                if row['neutral'] > TOO_FAR * row['neutral_before']:
                    break


if __name__ == '__main__':
    p, split = argparse.ArgumentParser(description=__doc__.splitlines()[0]), lambda s: s.split(',')
    p.add_argument('--out', required=True)
    p.add_argument('--models', type=split, default=list(START))
    p.add_argument('--kinds', type=split, default=['full', 'lora'])
    p.add_argument('--rates', type=lambda s: list(map(float, s.split(','))), default=RATES)
    p.add_argument('--abilities', type=split)
    p.add_argument('--steps', type=int)
    p.add_argument('--batch_size', type=int)
    main(**vars(p.parse_args()))
