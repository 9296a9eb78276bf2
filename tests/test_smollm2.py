"SmolLM2: adapters that match the manifest, weights made on first use, the lab's commands unchanged."

import json, pytest
from act.checkpoints import Checkpoint
from act.fingerprints import weight_hash
from act.loading import load_model
from act.kit.errors import ActError
from act.kit.records import sha256
from act.evaluate import EvalResult
from act.studies.cases import RESULTS
from act.zoo.smollm2 import ADAPTERS, RECIPES, WATCHED, gains, smollm2_manifest, smollm2_path, train_smollm2


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('ACT_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


def test_adapters_are_small_and_those_of_the_manifest():
    m = smollm2_manifest()
    assert set(m['adapters']) == {n for n, r in RECIPES.items() if r['lora']}
    for name, d in m['adapters'].items():
        f = ADAPTERS / name / 'adapter_model.safetensors'
        assert sha256(f.read_bytes()) == d['sha256']
        assert sum(p.stat().st_size for p in (ADAPTERS / name).iterdir()) <= 6e6
        assert d['recipe'] == json.loads(json.dumps({k: v for k, v in RECIPES[name].items()}))
        assert d['seed'] is not None


def test_recorded_scores_show_a_gain_of_each_specialist():
    results = {n: EvalResult.load(RESULTS / f'smollm2-{n}.json') for n in ('base', *RECIPES)}
    t = gains(results)
    assert len(t) == len(WATCHED)
    for name, recipe in RECIPES.items():
        own = recipe['abilities'][0].replace('/', '-')
        assert float(t.loc[own, name].split(', ')[1].rstrip(']')) < 0


@pytest.mark.slow
def test_the_commands_of_the_lab_on_a_real_model(cache, run, tmp_path):
    t = tmp_path
    (t / 'mine.jsonl').write_text(
        '\n'.join(
            json.dumps(dict(prompt=f'Question: What is {i} plus 2?\nAnswer:', answer=f' It is {i + 2}.'))
            for i in range(4)
        )
    )
    assert run(f'act_localize --target smollm2/spanish --donor smollm2 --ability {t}/mine.jsonl --out {t}/s')[0] == 0
    assert run(f'act_mask --scores {t}/s --p 0.01 --out {t}/m')[0] == 0
    code, out, _ = run(f'act_transfer --target smollm2/spanish --donor smollm2 --mask {t}/m --out {t}/moved')
    assert code == 0
    assert 'from smollm2' in out
    assert (
        run(f'act_finetune --model {t}/moved --ability {t}/mine.jsonl --steps 1 --batch_size 2 --out {t}/tuned')[0] == 0
    )
    code, out, _ = run(f'act_evaluate --model {t}/tuned --ability {t}/mine.jsonl --dtype bfloat16')
    assert code == 0
    assert 'mine' in out
    assert {p.name for p in (t / 'moved').iterdir()} >= {
        'config.json',
        'tokenizer.json',
        'model.safetensors',
        'act_transfer.json',
    }
    base, spanish, moved = (Checkpoint(f) for f in (smollm2_path(), smollm2_path('spanish'), t / 'moved'))
    assert len({weight_hash(m.folder) for m in (base, spanish, moved)}) == 3
    assert base.config['tie_word_embeddings']
    assert base.nbytes < 3e8


@pytest.mark.slow
def test_the_base_is_a_plain_checkpoint(cache):
    model, tok = load_model('smollm2')
    assert model.num_parameters() == 134515008
    assert tok.chat_template
    assert weight_hash(model) == smollm2_manifest()['base']['weights']


def test_what_fails_while_it_is_unpacked_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv('ACT_CACHE', str(tmp_path))

    def fails(out):
        raise ActError('no room')

    monkeypatch.setattr('act.zoo.smollm2.unpack_base', fails)
    with pytest.raises(ActError, match='no room'):
        smollm2_path()
    assert not (tmp_path / 'smollm2' / 'base').exists()


def test_names_and_recipes_that_are_not_there(cache):
    with pytest.raises(ActError, match='no SmolLM2 model'):
        smollm2_path('french')
    with pytest.raises(ActError, match='act_smollm2 --train maths-full'):
        smollm2_path('maths-full')
    with pytest.raises(ActError, match='no recipe'):
        train_smollm2('french')
