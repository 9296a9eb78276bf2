"The main job: a folder that appears whole, with the verdict first; and what the lab's training decides."

import json
import pandas as pd
import pytest
from act.kit.errors import ActError
from act.studies.choices import CHOICES
from act.studies.equal_sizes import BRIEF, RULES, in_brief, in_words
from act.studies.main_job import main_job, main_tables
from act.studies.size_results import EqualSizes
from act.studies.variants import grade_table, grade_words, measure_variants, measured_grades, recorded_variants, tails
from act.studies.variants import tail_words

ROWS = [
    'target',
    'donor',
    'random',
    'ACT',
    'ACT (module-normalised)',
    'trade-aware attribution',
    'noise twin (trade-aware)',
    'tuned on all items',
]


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    out = tmp_path_factory.mktemp('job') / 'out'
    return out, main_job(out, sizes=(0.02,), rows=ROWS, n=6, items=8, progress=False)


def test_the_folder_has_all_that_was_promised(job):
    out, result = job
    assert sorted(p.name for p in out.iterdir()) == [
        'after-2.png',
        'after-2.svg',
        'after.csv',
        'before-2.png',
        'before-2.svg',
        'before.csv',
        'cases',
        'numbers.csv',
        'report.html',
        'result.json',
        'verdicts.csv',
    ]
    assert EqualSizes.load(out / 'result.json').numbers().equals(result.numbers())
    assert list(pd.read_csv(out / 'verdicts.csv', index_col=0).index) == list(RULES)


def test_the_report_begins_with_the_verdict_and_is_whole(job):
    out, result = job
    page = (out / 'report.html').read_text()
    first = page.index('<b>The claim</b>')
    assert first < page.index('<table') < page.index('<svg') < page.index('Where these numbers come from')
    assert page.count('<figure>') == 2
    assert '**' not in page
    assert result.cases[0]['meta']['weights']['target'] in page
    for row in ROWS[:-1]:
        assert f'<th>{row}</th>' in page
    assert page.count('<th>tuned on all items</th>') == 1  # it is fine-tuning itself


def test_both_stages_have_the_same_rows_but_those_that_cannot_be_tuned(job):
    before, after = main_tables(job[1], (0.02,)).values()
    assert list(before.index) == ROWS
    assert list(after.index) == [row for row in ROWS if CHOICES[row].tuned]
    assert list(before.columns) == [('2 %', 'recovered'), ('2 %', 'retained')]


def test_there_is_one_sentence_each_for_claim_rule_and_score(job):
    lines = in_brief(job[1]).split('\n')
    assert [line.split('**')[1].lower() for line in lines] == list(BRIEF)
    assert len(in_words(job[1]).split('\n\n')) == len(RULES)


def test_right_answers_are_those_of_the_items(job):
    _, result = job
    one = next(m for m in result.cases[0]['models'] if (m['row'], m['tuned']) == ('target', False))
    bits = int(one['test']['science-zh'], 16)
    assert result.accuracy('target') == pytest.approx(bits.bit_count() / 6)
    assert result.accuracy('donor') == 1


def test_what_is_there_is_not_written_over(job):
    out, _ = job
    with pytest.raises(ActError, match='exists'):
        main_job(out)


@pytest.mark.parametrize('wrong, words', [(dict(recipe='cooking'), 'no recipe'), (dict(skill='taste'), 'no skill')])
def test_bad_names_leave_nothing(tmp_path, wrong, words):
    with pytest.raises(ActError, match=words):
        main_job(tmp_path / 'x', **wrong)
    assert not list(tmp_path.iterdir())


def test_variants_come_back_with_both_conditions(tmp_path):
    few = dict(seeds=(0,), items=8, n=4, progress=False)
    pairs = {'one': ('lab/maths-en', 'lab/base'), 'tied': ('lab/tied-maths-en', 'lab/tied-base')}
    found = recorded_variants(measure_variants(pairs, tmp_path / 'v.json', **few))
    assert [v['tied'] for v in found.values()] == [False, True]
    assert found['one']['channels'] - found['tied']['channels'] == 1600
    t = tails(found)
    assert set(t.condition) == {'pair', 'noise twin'}
    assert (t.value >= 1).all()
    assert tail_words(found).count('\n- ') == 2


def graded(job, folder, names=('mild', 'lab', 'hard')):
    d = json.loads((job[0] / 'result.json').read_text())
    for name in names:
        (folder / f'equal-sizes-{name}.json').write_text(json.dumps(d))


def test_grades_take_the_first_training_of_each_record(job, tmp_path):
    graded(job, tmp_path)
    d = json.loads((tmp_path / 'equal-sizes-lab.json').read_text())
    other = json.loads(json.dumps(d['cases'][0]))
    other['meta']['seed'], other['training'] = 2, 'another'
    d['cases'].append(other)
    (tmp_path / 'equal-sizes-lab.json').write_text(json.dumps(d))
    grades = measured_grades(tmp_path)
    assert [len(g.cases) for g in grades.values()] == [1, 1, 1]
    t = grade_table(grades)
    assert set(t.grade) == {'mild', 'medium', 'hard'}
    assert set(t.column) == {'recovered', 'retained'}
    assert grade_words(grades).count('\n- ') == 3
