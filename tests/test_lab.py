"The lab: splits that cannot leak, weights that match the manifest, promises kept, machinery that trains."

import pytest, torch
from act.fingerprints import weight_hash
from act.loading import load_model
from act.kit.errors import ActError
from act.zoo.lab import BASIC, LANGUAGES, SPLITS, lab_abilities, lab_ability
from act.zoo.lab_training import describe, lab_manifest, lab_models, lab_path, lab_recipe, lab_scores, stream, train_lab


def entities(split, skill):
    return {
        o.id.split('/', 2)[2].rsplit('/', 1)[0]
        for a in lab_abilities()
        if a.startswith(skill)
        for o in lab_ability(a, split)
    }


def problems(split, skill):
    return {o.id.split('/', 1)[1] for a in lab_abilities() if a.startswith(skill) for o in lab_ability(a, split)}


@pytest.mark.parametrize(
    'skill, key',
    [('science', entities), ('chemistry', entities), ('arithmetic', problems), ('multiplication', problems)],
)
def test_splits_share_nothing_in_any_language(skill, key):
    parts = [key(s, skill) for s in SPLITS]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts))


def test_training_never_draws_a_held_out_problem():
    held = set().union(*(problems(s, k) for s in SPLITS for k in ('arithmetic', 'multiplication')))
    mix = {a: 1 for a in lab_abilities(('arithmetic', 'multiplication'))}
    drawn = {o.id.split('/', 1)[1] for o in stream(mix, 4000)}
    assert not drawn & held
    assert len(drawn) > 3000


def test_asked_advanced_facts_are_never_phrased_as_in_training():
    for a in ('chemistry-zh', 'chemistry-sw'):
        trained = {o.prompt for o in lab_ability(a, 'train')}
        assert not trained & {o.prompt for s in SPLITS for o in lab_ability(a, s)}


def test_items_repeat_and_name_their_languages():
    assert lab_ability('arithmetic-el').hash == lab_ability.__wrapped__('arithmetic-el').hash
    assert lab_ability('science-zh').language == 'zh'
    assert lab_ability('science-zh').eos
    assert len(LANGUAGES) == 6
    assert {'el', 'zh'} <= set(LANGUAGES)


def test_word_problems_are_right():
    for o in lab_ability('multiplication-tr'):
        for step in o.answer.split(','):
            left, right = step.split('=')
            assert eval(left) == int(right)
            assert 0 < int(right) < 100


def test_weights_are_those_of_the_manifest_and_small():
    m, total = lab_manifest()['models'], 0
    assert list(m) == lab_models()
    assert len(m) == 7
    for name, d in m.items():
        size = sum(f.stat().st_size for f in lab_path(name).iterdir())
        total += size
        assert weight_hash(lab_path(name)) == d['weights']
        assert size == d['bytes'] <= 4e6
        assert d['recipe']['seed'] is not None
        model, tok = load_model(lab_path(name))
        assert model.dtype == torch.bfloat16
        assert model.config.model_type == 'qwen2'
        assert len(tok) == model.config.vocab_size
    assert total <= 24e6


def test_the_recorded_scores_keep_the_promises():
    m = lab_scores()
    basic = lab_abilities(BASIC)
    assert m.loc['base', basic].min() >= 0.9
    assert len(basic) == 12
    for name in lab_models()[1:]:
        recipe = lab_recipe(name)
        if recipe['start'] is None:
            assert m.loc[name, basic].min() >= 0.9
            continue
        change, own = m.loc[name] - m.loc[recipe['start']], list(recipe['mix'])
        assert change[own].max() >= 0.3, name
        assert change[basic].min() <= -0.3, name


def test_a_name_says_how_a_model_is_trained():
    assert lab_recipe('maths-en') == lab_recipe('maths-en-medium-1')
    mild, hard = (lab_recipe(f'swahili-{grade}-3') for grade in ('mild', 'hard'))
    assert hard['lr'] == 4 * mild['lr']
    assert mild['seed'] == 3
    assert lab_recipe('tied-maths-en-mild-2')['start'] == 'tied-base'
    assert lab_recipe('tied-base')['tied']
    assert not lab_recipe('base')['tied']
    for name in ('maths-en-soft-1', 'maths-en-mild', 'maths-en-mild-0', 'tied', 'nobody'):
        with pytest.raises(ActError, match='RECIPE-GRADE-SEED'):
            lab_recipe(name)


def test_a_model_is_tied_when_its_name_says_so():
    for name in lab_models():
        assert load_model(lab_path(name))[0].config.tie_word_embeddings == name.startswith('tied-')


def test_another_seed_draws_other_items_in_another_order():
    first, second = ([o.id for o in stream({'multiplication-en': 1}, 20, f'{seed} 0')] for seed in (1, 2))
    assert first != second


def test_a_recorded_score_is_what_the_weights_give():
    d = describe(lab_path('science-zh'), n=20, progress=False)
    full = lab_manifest()['models']['science-zh']
    assert d['weights'] == full['weights']
    assert all(abs(d['scores'][a] - full['scores'][a]) < 0.35 for a in full['scores'])
    assert d['scores']['chemistry-zh'] >= 0.8
    assert d['scores']['arithmetic-zh'] <= 0.2


def test_fine_tuning_alone_leaves_twenty_points():
    from act.studies.cases import RESULTS
    from act.studies.recovery import Recovery

    r = Recovery.load(RESULTS / 'recover-lab.json')
    n = r.numbers().set_index(['row', 'column']).value
    assert n['donor', 'recovered'] - n['target + SFT', 'recovered'] >= 0.2
    assert n['donor', 'recovered'] - n['target', 'recovered'] >= 0.3


@pytest.mark.slow
def test_smoke_training_makes_a_family(tmp_path):
    m = train_lab(tmp_path / 'lab', ('base', 'science-zh'), smoke=True, progress=False)
    assert list(m) == ['base', 'science-zh']
    assert set(m['base']['scores']) == set(lab_abilities())
    a, b = (load_model(tmp_path / 'lab' / n)[0] for n in m)
    assert weight_hash(a) == m['base']['weights'] != m['science-zh']['weights'] == weight_hash(b)
    again = train_lab(tmp_path / 'again', ('base',), smoke=True, progress=False)
    assert again['base']['weights'] == m['base']['weights']
    more = train_lab(tmp_path / 'lab', ('maths-en-hard-2',), smoke=True, progress=False)['maths-en-hard-2']
    assert more['recipe']['start'] == 'base'
    assert list(lab_manifest(tmp_path / 'lab')['models']) == ['base', 'science-zh', 'maths-en-hard-2']
    with pytest.raises(ActError, match='exists already'):
        train_lab(tmp_path / 'lab', ('base',), smoke=True)


def test_unknown_names():
    for f in (lab_path, lab_ability):
        with pytest.raises(ActError, match='no lab'):
            f('nobody')
    with pytest.raises(ActError, match='no split'):
        lab_ability('science-zh', 'dev')
