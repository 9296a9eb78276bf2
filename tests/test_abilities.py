"Abilities: answer positions by character offsets, padding on either side, files and sources that say what is wrong."
import json, pytest, torch
from act.abilities import SHARES, Ability, Item, batches, encode, load_ability, read_jsonl, render, short_name
from act.core import ActError
from conftest import tiny_model, toy_tokenizer

ITEMS = [Item('two plus two is', ' four'), Item('五和六', '共十一'), Item('q:', ' ocho')]

def test_files_of_an_ability_share_one_name(tmp_path):
    (tmp_path/'deep').mkdir()
    for split, n in (('sft', 1), ('test', 2)):
        for file in (f'sums-{split}.jsonl', f'deep/{split}.jsonl'): Ability('x', ITEMS[:n]).save(tmp_path/file)
    for file, name in (('sums-{split}.jsonl', 'sums'), ('deep/{split}.jsonl', 'deep')):
        read = [load_ability(f'{tmp_path}/{file}', split) for split in ('sft', 'test')]
        assert [(a.name, len(a)) for a in read] == [(name, 1), (name, 2)]
    assert load_ability(tmp_path/'sums-test.jsonl').name == short_name('sums-test.jsonl') == 'sums-test'
    with pytest.raises(ActError, match='sums-localize.jsonl cannot be read'): load_ability(f'{tmp_path}/sums-{{split}}.jsonl', 'localize')

def text_at(tok, encoded, item):
    "What the tokens at the answer positions spell."
    return tok.decode([encoded.input_ids[i] for i in encoded.answer])

def test_answer_tokens_spell_the_answer(tokenizer):
    for o, e in zip(ITEMS, encode(ITEMS, tokenizer)): assert text_at(tokenizer, e, o) == o.answer and e.positions == e.answer

def test_by_hand_one_byte_a_token(tokenizer):
    e = encode([Item('xyz', 'wv')], tokenizer)[0]
    assert len(e.input_ids) == 5 and e.positions == [3, 4]
    assert encode([Item('xyz', 'wv')], tokenizer, positions='predict')[0].positions == [2, 3]

def test_a_token_across_the_border_counts_as_answer(tokenizer):
    whole = tokenizer('two plus')['input_ids']
    e = encode([Item('two pl', 'us')], tokenizer)[0]
    assert e.input_ids == whole and e.answer[-1] == len(whole) - 1 and len(e.answer) >= 1

def test_nothing_is_inserted_between_prompt_and_answer(tokenizer):
    e = encode([Item('abc', 'def')], tokenizer)[0]
    assert e.input_ids == tokenizer('abcdef')['input_ids'] and tokenizer.eos_token_id not in e.input_ids

def test_the_end_of_text_is_added_when_asked(tokenizer):
    e = encode([Item('abc', 'd')], tokenizer, eos=True)[0]
    assert e.input_ids[-1] == tokenizer.eos_token_id and e.answer == [3, 4]

@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_by_hand(tokenizer, side):
    enc = encode([Item('abcd', 'ef'), Item('x', 'y')], tokenizer)
    b, = batches(enc, tokenizer, padding_side=side, alike=0)
    pad = [tokenizer.pad_token_id]*4
    assert b['index'] == [0, 1]
    assert b['input_ids'][1].tolist() == (pad + enc[1].input_ids if side == 'left' else enc[1].input_ids + pad)
    assert b['positions'][1].tolist() == [False]*5 + [True] if side == 'left' else [False, True] + [False]*4
    assert b['position_ids'][1].tolist()[-2 if side == 'left' else 0:][:2] == [0, 1]
    assert b['attention_mask'].sum().item() == 8

@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_does_not_change_what_the_model_computes(tokenizer, side):
    model, enc = tiny_model(), encode(ITEMS, tokenizer)
    for b in batches(enc, tokenizer, padding_side=side, alike=0):
        logits = model(input_ids=b['input_ids'], attention_mask=b['attention_mask'], position_ids=b['position_ids']).logits[b['positions']]
        alone = torch.cat([model(torch.tensor([enc[i].input_ids])).logits[0, enc[i].positions] for i in b['index']])
        assert torch.allclose(logits, alone, atol=1e-5)

def test_batches_hold_every_item_once_within_budget(tokenizer):
    items = [Item('a'*n, 'b') for n in (30, 3, 12, 7, 50, 1)]
    bs = list(batches(encode(items, tokenizer), tokenizer, batch_tokens=60))
    assert sorted(i for b in bs for i in b['index']) == list(range(6))
    assert all(b['input_ids'].numel() <= 60 for b in bs)

def test_little_of_a_batch_is_padding(tokenizer):
    enc = encode([Item('a'*n, 'b') for n in range(1, 120)], tokenizer)
    share = lambda **kw: [1 - b['attention_mask'].float().mean().item() for b in batches(enc, tokenizer, **kw)]
    assert max(share()) <= 1/8 < max(share(alike=0))

def test_cutting_keeps_what_fits_and_an_empty_ability_is_named(tokenizer):
    short, long = Item('a', 'b'), Item('a'*50, 'b')
    assert len(encode([short, long], tokenizer, max_length=20)) == 1
    with pytest.raises(ActError, match='ability maths-en has no answer tokens left after cutting at 20'): encode(Ability('maths-en', [long]), tokenizer, max_length=20)

def test_the_chat_template_wraps_the_prompt_and_ends_the_answer():
    tok = toy_tokenizer()
    with pytest.raises(ActError, match='no chat template'): encode(ITEMS, tok, chat=True)
    tok.chat_template = "{% for m in messages %}<{{m.role}}>{{m.content}}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    assert render(Item('hi', 'yo'), tok, chat=True) == ('<user>hi</><assistant>', 'yo</>')
    e = encode([Item('hi', 'yo')], tok, chat=True)[0]
    assert text_at(tok, e, None) == 'yo</>'

def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow: is_fast = False
    with pytest.raises(ActError, match='fast tokenizer'): encode(ITEMS, Slow())

def test_positions_unknown(tokenizer):
    with pytest.raises(ActError, match="'read' or 'predict'"): encode(ITEMS, tokenizer, positions='all')

@pytest.mark.parametrize('text, words', [
    ('{"prompt": "a", "answer": "b"}\nnot json\n', 'line 2: not JSON'), ('{"prompt": "a"}\n', 'line 1: no text under'), ('\n{"prompt": "a", "answer": 3}\n', 'line 2'),
    ('[1]\n', 'line 1'), ('{"prompt": "a", "answer": "  "}\n', 'line 1: the answer is empty'), ('', 'holds no items'), ('\n\n', 'holds no items')])
def test_bad_jsonl_names_file_and_line(tmp_path, text, words):
    (tmp_path/'mine.jsonl').write_text(text)
    with pytest.raises(ActError, match=words) as e: load_ability(tmp_path/'mine.jsonl')
    assert 'mine.jsonl' in str(e.value)

def test_bytes_that_are_not_text(tmp_path):
    (tmp_path/'x.jsonl').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ActError, match='x.jsonl cannot be read as UTF-8'): read_jsonl(tmp_path/'x.jsonl')
    with pytest.raises(ActError, match='absent.jsonl'): read_jsonl(tmp_path/'absent.jsonl')

def test_jsonl_round_trip(tmp_path):
    a = Ability('maths-sw', ITEMS)
    b = load_ability(str(a.save(tmp_path/'maths-sw.jsonl')))
    assert a.hash == b.hash and (b.skill, b.language, b.eos) == ('maths', 'sw', False)

def test_an_ability_without_items_or_answers():
    with pytest.raises(ActError, match='has no items'): Ability('x', [])
    with pytest.raises(ActError, match='item 1 .* empty answer'): Ability('x', [Item('a', 'b'), Item('a', ' ')])

def test_samples_repeat_and_know_their_limits():
    a = Ability('x', [Item(str(i), 'b') for i in range(20)], eos=True)
    assert a.sample(5, 1).hash == a.sample(5, 1).hash != a.sample(5, 2).hash and a.sample(5).eos and a[:3].eos
    with pytest.raises(ActError, match='21 items asked'): a.sample(21)

@pytest.fixture
def mirror(tmp_path, monkeypatch):
    "A small local mirror of every source."
    def put(name, rows):
        f = tmp_path/name
        f.parent.mkdir(exist_ok=True)
        f.write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows))
    for f in ('train', 'test'): put(f'gsm8k/{f}.jsonl', [dict(question=f'{f} {i}?', answer=f'So <<{i}+1={i+1}>>{i+1}\n#### {i+1}') for i in range(60)])
    for o in ('en', 'es'):
        put(f'mgsm/{o}.jsonl', [dict(question=f'{o} {i}?', answer_number=i, answer=None) for i in range(60)])
        put(f'xquad/{o}.jsonl', [dict(context=f'{o} paragraph {i//3} with some words in it', question=f'{i}?', answers=[f'answer {i}']) for i in range(180)])
    monkeypatch.setenv('ACT_DATA', str(tmp_path)); monkeypatch.setenv('HF_HUB_OFFLINE', '1')

@pytest.mark.parametrize('spec', ['gsm8k/en', 'mgsm/es', 'xquad/es', 'xquad-text/en'])
def test_splits_of_a_source_are_disjoint_and_lose_nothing(mirror, spec):
    parts = {}
    for s in SHARES:
        try: parts[s] = {(o.prompt, o.answer) for o in load_ability(spec, s)}
        except ActError as e: assert 'has no items' in str(e)
    assert {'test', 'localize', 'sft', 'validation'} <= set(parts)
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == dict(gsm8k=120, mgsm=60, xquad=180).get(spec.split('/')[0], 60)

def test_parallel_paragraphs_share_a_split(mirror):
    for s in SHARES:
        a, b = ({o.id.split('/')[-1] for o in load_ability(f'xquad-text/{o}', s)} for o in ('en', 'es'))
        assert a == b

def test_worked_answers_lose_their_calculator_notes(mirror):
    o = load_ability('gsm8k/en')[0]
    assert o.answer.startswith(' So ') and '<<' not in o.answer and '####' in o.answer

def test_no_data_names_both_ways(monkeypatch, tmp_path):
    monkeypatch.setenv('ACT_DATA', str(tmp_path)); monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ActError, match='ACT_DATA.*openai/gsm8k'): load_ability('gsm8k/en')
    monkeypatch.delenv('ACT_DATA')
    with pytest.raises(ActError, match='ACT_DATA.*juletxara/mgsm'): load_ability('mgsm/sw')

def test_unknown_names_and_splits(mirror):
    with pytest.raises(ActError, match='no ability is called'): load_ability('poetry/en')
    with pytest.raises(ActError, match='no split is called'): load_ability('gsm8k/en', 'dev')
    with pytest.raises(ActError, match='no lab ability'): load_ability('lab/poetry-en')
