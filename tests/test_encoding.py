"One encoding for all stages: which ids a model sees, and which of them are the answer, in chat and without it."
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from act.abilities import Ability, EncodedItem, Item, check_fits, encode, encode_prompts, reads, render
from act.core import ActError

QWEN3 = "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
R1 = "{%- for m in messages %}{%- if m.role == 'user' %}{{'<|User|>' + m.content}}{%- else %}{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + c + '<|end_of_sentence|>'}}{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{'<|Assistant|><think>\\n'}}{% endif %}"
LLAMA3 = "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
GEMMA = "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
PARTS = "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}</{{ m.role }}>{% endfor %}"
ANSWER_PARTS = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}{{ m.content }}{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}</{{ m.role }}>{% endfor %}"
STRICT = "{{ raise_exception('roles must alternate') }}"
TEMPLATES = dict(plain=None, qwen3=QWEN3, r1=R1, llama3=LLAMA3, gemma=GEMMA)
TAGS = ['<|im_start|>', '<|im_end|>', '<|end_of_sentence|>', '<|eot_id|>', '<end_of_turn>']

def byte_tokenizer(bos=False, eos=False, merges=True, template=None):
    "Byte-level BPE of 320 entries; it may put <bos> first and <eos> last, and with `merges` it joins '?' with the line end behind it."
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    tok.pre_tokenizer, tok.decoder = split, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=['<pad>', '<bos>', '<eos>', *TAGS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator(['?\n']*9 + ['\n4', '42', 'two', ' two', ' plus', ' four']*5, trainer)
    ends = [('<bos>', 1)]*bos + [('<eos>', 2)]*eos
    if ends: tok.post_processor = processors.TemplateProcessing(single=' '.join(['<bos>']*bos + ['$A'] + ['<eos>']*eos), special_tokens=ends)
    out = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', bos_token='<bos>' if bos else None, eos_token='<eos>')
    if template: out.chat_template = template
    out.name_or_path = '/somewhere/lab-chat'
    return out

def spelt(tok, e): return tok.decode([e.input_ids[i] for i in e.answer])

@pytest.mark.parametrize('name', ['qwen3', 'r1', 'llama3', 'gemma'])
@pytest.mark.parametrize('answer', ['42', ' 42', 'e', 'd', 'of', 'i', 'assistant', 'user', 'two\n\nlines', '<b>'])
def test_the_answer_alone_counts_in_every_template(name, answer):
    tok = byte_tokenizer(merges=False, template=TEMPLATES[name])
    before, counted, rest = render(Item('21+21?', answer), tok, chat=True)
    assert counted == (answer.strip() if name in ('llama3', 'gemma') else answer)
    want = tok.apply_chat_template([dict(role='user', content='21+21?'), dict(role='assistant', content=answer)], tokenize=False)
    assert before + counted + rest == want
    e, = encode([Item('21+21?', answer)], tok, chat=True)
    assert spelt(tok, e) == counted == e.text
    assert e.input_ids == tok(want, add_special_tokens=False)['input_ids']

def test_an_empty_think_block_belongs_to_the_prompt():
    before, _, rest = render(Item('21+21?', '42'), byte_tokenizer(template=QWEN3), chat=True)
    assert before.endswith('<think>\n\n</think>\n\n') and rest == '<|im_end|>\n'

@pytest.mark.parametrize('name, end', [('qwen3', '<|im_end|>'), ('r1', '<|end_of_sentence|>'), ('llama3', '<|eot_id|>'), ('gemma', '<end_of_turn>')])
def test_the_token_that_ends_the_turn_counts_when_asked(name, end):
    tok = byte_tokenizer(template=TEMPLATES[name])
    without, with_end = (encode([Item('a?', 'b')], tok, chat=True, eos=o)[0] for o in (False, True))
    assert without.input_ids == with_end.input_ids
    assert [tok.convert_ids_to_tokens(with_end.input_ids[i]) for i in with_end.answer[len(without.answer):]] == [end]

@pytest.mark.parametrize('template, item, words', [
    (R1, Item('21+21?', '<think>\nadd\n</think>\n\n42', id='mine.jsonl:7'), r'item mine.jsonl:7 of ability sums: the chat template of lab-chat changes the answer'),
    (R1, Item('21+21?', '<think>42</think>'), 'item 0 of ability sums: the chat template of lab-chat changes the answer'),
    (ANSWER_PARTS, Item('a', 'b'), 'of lab-chat drops the answer'), (PARTS, Item('a', 'b'), 'of lab-chat drops the answer'),
    ("{% for m in messages %}{{ m.content if m.role == 'assistant' }}{% endfor %}", Item('abc', 'b'), 'drops or changes the prompt'),
    ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", Item('abc', 'b'), 'repeats the answer'),
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", Item('abc', 'b'), 'drops the answer'),
    (STRICT, Item('abc', 'b'), r'fails \(roles must alternate\)'), ("{{ messages[0].content.nothing.here }}", Item('abc', 'b'), 'fails'), ("{% if %}", Item('abc', 'b'), 'fails')])
def test_a_template_that_does_not_keep_the_answer_is_named(template, item, words):
    tok = byte_tokenizer(template=template)
    with pytest.raises(ActError, match=words) as e: encode(Ability('sums', [item]), tok, chat=True)
    assert 'leave chat off' in str(e.value) and '/somewhere' not in str(e.value)

def test_a_prompt_that_holds_the_sentinel():
    from act.abilities import _SENTINEL
    tok = byte_tokenizer(template=QWEN3)
    assert render(Item(_SENTINEL, _SENTINEL), tok, chat=True)[1] == _SENTINEL

@pytest.mark.parametrize('bos', [False, True])
@pytest.mark.parametrize('chat', [False, True])
def test_what_a_tokenizer_appends_is_left_out_unless_asked_for(bos, chat):
    tok, plain = (byte_tokenizer(bos, eos, template=LLAMA3) for eos in (True, False))
    items = [Item('two plus?', ' four'), Item('x', 'y')]
    for eos in (False, True): assert encode(items, tok, chat=chat, eos=eos) == encode(items, plain, chat=chat, eos=eos)
    assert encode_prompts(items, tok, chat=chat) == encode_prompts(items, plain, chat=chat)
    if not chat:
        e = encode(items, tok, eos=True)[1]
        assert e.input_ids[-1] == tok.eos_token_id and e.input_ids[-2] != tok.eos_token_id and e.answer[-1] == len(e.input_ids) - 1
        assert (encode(items, tok)[0].input_ids[0] == tok.bos_token_id) == bos

def test_a_merge_across_the_border_is_the_answers():
    tok = byte_tokenizer()
    assert spelt(tok, encode([Item('two plus two?', '\n4')], tok)[0]) == '?\n4'
    assert spelt(tok, encode([Item('two plus two?\n', '4')], tok)[0]) == '4'

@pytest.mark.parametrize('prompt', ['', ' ', '\n'])
def test_blank_prompts(prompt):
    item = Item(prompt, 'drum', id='x:1')
    tok = byte_tokenizer(bos=True, merges=False)
    e, = encode([item], tok)
    assert spelt(tok, e) == 'drum' and e.input_ids[0] == 1
    assert encode_prompts([item], tok)[0].input_ids == e.input_ids[:e.answer[0]]
    bare = byte_tokenizer(merges=False)
    if prompt: assert spelt(bare, encode([item], bare)[0]) == 'drum'
    else:
        with pytest.raises(ActError, match='item x:1: its answer begins at the first token.*give it a prompt'): encode([item], bare)
        with pytest.raises(ActError, match='item x:1: its prompt is empty'): encode_prompts([item], bare)

def test_a_first_token_that_merges_with_the_answer_is_refused():
    tok = byte_tokenizer()
    assert len(tok('?\n')['input_ids']) == 1
    with pytest.raises(ActError, match='item 0: its answer begins at the first token'): encode([Item('?', '\n')], tok)

def test_a_lone_space_whose_span_is_trimmed_still_counts():
    "Llama 3 trims spaces from the spans of tokens: the space before a digit is a token of its own, with an empty span."
    tok = byte_tokenizer(merges=False)
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert any(a == b for a, b in tok('=: 42', return_offsets_mapping=True)['offset_mapping'])
    for item in (Item('=:', ' 42'), Item('=: ', '42'), Item('=:', ' 4 ')): assert spelt(tok, encode([item], tok)[0]) == item.answer

@pytest.mark.parametrize('bos', [False, True])
def test_cut_on_the_left_keeps_the_answer(bos):
    tok = byte_tokenizer(bos, merges=False)
    whole, = encode([Item('abcdefgh', 'xyz')], tok)
    e, = encode([Item('abcdefgh', 'xyz')], tok, max_length=6, cut='left')
    assert len(e.input_ids) == 6 and spelt(tok, e) == 'xyz' and e.input_ids[-5 if bos else -6:] == whole.input_ids[-5 if bos else -6:]
    assert (e.input_ids[0] == tok.bos_token_id) == bos
    assert encode([Item('abcdefgh', 'xyz')], tok, max_length=4, cut='left')[0].answer == [1, 2, 3] # one token before it, the <bos> where there is one
    with pytest.raises(ActError, match='item long: its answer takes 3 tokens .* into 3: raise max_length'): encode([Item('abc', 'xyz', id='long')], tok, max_length=3, cut='left')
    with pytest.raises(ActError, match="'right' or 'left'"): encode([Item('a', 'b')], tok, cut='middle')

def test_what_a_model_cannot_read_is_named():
    e = [EncodedItem([1, 7], [1], [1], 'x', 'item 3 of ability sums')]
    check_fits(e, 8, 2, 'm'); check_fits(e, None, None, 'm')
    with pytest.raises(ActError, match="item 3 of ability sums: token id 7 is outside the model's vocabulary of 7 .m.: use the model's own tokenizer"): check_fits(e, 7, None, 'm')
    with pytest.raises(ActError, match='item 3 of ability sums is 2 tokens long and m reads 1: pass max_length=1'): check_fits(e, None, 1, 'm')

@pytest.mark.parametrize('config, want', [
    (dict(vocab_size=9, max_position_embeddings=64), (9, 64)), (dict(n_positions=32, vocab_size=9), (9, 32)), ({}, (None, None)),
    (dict(text_config=dict(vocab_size=5, max_position_embeddings=16)), (5, 16)),
    (dict(vocab_size=9, max_position_embeddings=64, rope_scaling=dict(rope_type='linear', factor=4.)), (9, 256)),
    (dict(vocab_size=9, max_position_embeddings=64, rope_scaling=dict(rope_type='yarn', factor=4., original_max_position_embeddings=64)), (9, 256)),
    (dict(vocab_size=9, max_position_embeddings=128, rope_scaling=dict(rope_type='llama3', factor=8., original_max_position_embeddings=8)), (9, 128))])
def test_what_a_configuration_says(config, want): assert reads(type('M', (), dict(config=config))) == want
