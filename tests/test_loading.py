"Folders as people have them: loaded as by transformers with every weight in its place, or refused in one true line."

import fcntl, json, os, shutil, threading
import pytest, torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
from act.abilities import Ability, Item
from act.checkpoints import Checkpoint, INDEX
from act.fingerprints import weight_hash
from act.loading import cached, channels_of, load_model, load_tokenizer, resolve
from act.writer import copy_extras
from act.kit.errors import ActError
from act.commands.way import act_evaluate, act_finetune, act_localize
from conftest import SIZES, tiny_model, toy_tokenizer

WEIGHTS = 'model.safetensors'


def rename(folder, change):
    "Save the weights under other names; None leaves a tensor out."
    t = load_file(folder / WEIGHTS)
    save_file({change(k): v for k, v in t.items() if change(k)}, folder / WEIGHTS, metadata=dict(format='pt'))


def edit(folder, **change):
    d = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({k: v for k, v in {**d, **change}.items() if v is not None}))


@pytest.fixture
def folder(checkpoint):
    return checkpoint('model', tiny_model('llama3'))


@pytest.fixture
def data(tmp_path):
    return str(
        Ability('sums', [Item(f'what is {i} plus {i}? ', str(2 * i)) for i in range(6)]).save(tmp_path / 'sums.jsonl')
    )


def commands(folder, data, tmp_path, checkpoint):
    "The commands that load a model, each as a function."
    other = checkpoint('other', tiny_model('llama3', 1))
    return dict(
        evaluate=lambda: act_evaluate(model=str(folder), ability=data, out=str(tmp_path / 'e.json'), split='all'),
        finetune=lambda: act_finetune(model=str(folder), ability=data, out=str(tmp_path / 'f'), steps=1, split='all'),
        localize=lambda: act_localize(
            target=str(folder), donor=str(other), ability=data, out=str(tmp_path / 's'), split='all'
        ),
    )


# weights that are not where they should be

NAMES = dict(
    compiled=(lambda k: f'_orig_mod.{k}', 'torch.compile'),
    parallel=(lambda k: f'module.{k}', 'DataParallel'),
    adapted=(lambda k: f"base_model.model.{k.replace('q_proj.', 'q_proj.base_layer.')}", 'PEFT'),
    wrapped=(lambda k: f'language_model.{k}', 'multimodal'),
    nested=(lambda k: k.replace('self_attn.', 'self_attn._orig_mod.'), 'torch.compile'),
    odd=(lambda k: f'my.net.{k}', 'the prefix my.net.'),
    layer=(lambda k: None if 'layers.1.' in k else k, r'lacks the tensor model.layers.1.\S+ \(9 missing\)'),
)


@pytest.mark.parametrize('change, word', NAMES.values(), ids=NAMES)
def test_weights_that_are_not_found_are_refused_with_the_reason(folder, change, word):
    rename(folder, change)
    with pytest.raises(ActError, match=word):
        load_model(folder)
    with pytest.raises(ActError, match=word):
        channels_of(folder)


@pytest.mark.parametrize('command', ['evaluate', 'finetune', 'localize'])
def test_every_command_refuses_random_weights(folder, data, tmp_path, checkpoint, command):
    rename(folder, NAMES['compiled'][0])
    with pytest.raises(ActError, match='_orig_mod'):
        commands(folder, data, tmp_path, checkpoint)[command]()
    assert not any((tmp_path / f).exists() for f in ('e.json', 'f', 's'))


def test_layers_that_the_configuration_does_not_know_are_refused(folder):
    edit(folder, num_hidden_layers=1)
    with pytest.raises(ActError, match='holds the tensor model.layers.1'):
        load_model(folder)


def test_a_shape_that_the_configuration_does_not_know_is_named(folder):
    edit(folder, intermediate_size=32)
    with pytest.raises(
        ActError,
        match=r'mlp.\w+ has shape|down_proj.weight in .* has shape \(16, 24\), its config.json says \(16, 32\)',
    ):
        load_model(folder)


# which files make the model


def test_a_single_file_comes_before_an_older_index(checkpoint, tmp_path):
    old, new = (
        checkpoint('old', tiny_model('llama3', 1), max_shard_size='5KB'),
        checkpoint('new', tiny_model('llama3', 0)),
    )
    for f in old.glob('model*'):
        shutil.copy(f, new)
    plain = AutoModelForCausalLM.from_pretrained(new)
    assert weight_hash(new) == weight_hash(plain) == weight_hash(tiny_model('llama3', 0))
    assert Checkpoint(new).index is None


def test_an_index_whose_shards_are_gone_does_not_matter_beside_a_single_file(checkpoint):
    folder = checkpoint('model', tiny_model('llama3'))
    (folder / INDEX).write_text(json.dumps(dict(weight_map={'model.norm.weight': 'model-00001-of-00002.safetensors'})))
    load_model(folder)


def test_a_link_to_nowhere_that_nobody_needs_does_not_matter(folder, tmp_path):
    (folder / 'README.json').symlink_to(tmp_path / 'gone')
    load_model(folder)


def test_weights_that_are_a_link_to_nowhere_are_called_so(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / 'gone')
    with pytest.raises(ActError, match='model.safetensors is a link to a file that is not there'):
        load_model(folder)


@pytest.mark.parametrize('name', [WEIGHTS, 'config.json', 'tokenizer.json'])
def test_git_lfs_pointers_are_called_by_their_name(folder, name):
    (folder / name).write_text(
        'version https://git-lfs.github.com/spec/v1\noid'
        ' sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n'
    )
    with pytest.raises(ActError, match=f'{name} is a git-lfs pointer.*git lfs pull'):
        load_model(folder)


def test_eight_bit_weights_are_called_quantised(folder):
    t = load_file(folder / WEIGHTS)
    save_file(
        {k: v.to(torch.float8_e4m3fn) if 'proj' in k else v for k, v in t.items()},
        folder / WEIGHTS,
        metadata=dict(format='pt'),
    )
    with pytest.raises(ActError, match=r'quantised \(\S+ has type F8_E4M3\): get the model.s 16-bit weights'):
        load_model(folder)


def test_packed_integers_are_called_quantised(folder):
    t = load_file(folder / WEIGHTS)
    save_file(
        {k.replace('.weight', '.qweight') if 'proj' in k else k: v.int() if 'proj' in k else v for k, v in t.items()},
        folder / WEIGHTS,
        metadata=dict(format='pt'),
    )
    with pytest.raises(ActError, match='quantised .*I32'):
        load_model(folder)


def test_a_quantisation_that_only_the_configuration_knows_is_explained(folder):
    edit(folder, quantization_config=dict(quant_method='bitsandbytes', load_in_4bit=True))
    with pytest.raises(ActError, match='says that it is quantised .bitsandbytes.*remove quantization_config'):
        load_model(folder)


@pytest.mark.parametrize(
    'file, word',
    [('pytorch_model.bin', 'pickle is never loaded'), ('consolidated.safetensors', "its maker's own format")],
)
def test_other_formats_alone_are_called_by_their_name(folder, file, word):
    (folder / WEIGHTS).rename(folder / file)
    with pytest.raises(ActError, match=word):
        load_model(folder)


@pytest.mark.parametrize(
    'name, word',
    [('m-00002-of-00003.gguf', 'part 2 of 3'), ('M.GGUF', 'not a readable GGUF file'), ('no.gguf', 'there is no file')],
)
def test_gguf_files_by_any_name(tmp_path, name, word):
    pytest.importorskip('gguf')
    if not name.startswith('no'):
        (tmp_path / name).write_bytes(b'GGUF but not really')
    with pytest.raises(ActError, match=word):
        resolve(tmp_path / name)


def test_a_folder_of_gguf_files_says_which_to_pass(tmp_path):
    (tmp_path / 'm.gguf').touch()
    with pytest.raises(ActError, match='pass the file itself, .*m.gguf'):
        load_model(tmp_path)


# adapters and wrappers


@pytest.fixture
def adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(
        tiny_model('llama3'), LoraConfig(r=2, target_modules=['q_proj'], init_lora_weights=False)
    ).save_pretrained(tmp_path / 'adapter')
    return tmp_path / 'adapter'


@pytest.mark.parametrize('command', ['evaluate', 'finetune', 'localize'])
def test_an_adapter_beside_a_model_is_seen(folder, adapter, data, tmp_path, checkpoint, command):
    shutil.copy(adapter / 'adapter_config.json', folder)
    with pytest.raises(ActError, match='holds a PEFT adapter .* beside a model'):
        commands(folder, data, tmp_path, checkpoint)[command]()


def test_an_adapter_alone_is_called_an_adapter(adapter):
    with pytest.raises(ActError, match='holds a PEFT adapter .* and no model: merge it'):
        load_model(adapter)


def test_extras_go_along_and_adapters_do_not(folder, adapter, tmp_path):
    for f in ('LICENSE', 'NOTICE.txt', 'README.md', INDEX):
        (folder / f).write_text(f)
    (folder / 'additional_chat_templates').mkdir()
    (folder / 'additional_chat_templates/tools.jinja').write_text('x')
    shutil.copy(adapter / 'adapter_config.json', folder)
    (tmp_path / 'to').mkdir()
    copy_extras(folder, tmp_path / 'to')
    there = {str(f.relative_to(tmp_path / 'to')) for f in (tmp_path / 'to').rglob('*') if f.is_file()}
    assert there >= {'LICENSE', 'NOTICE.txt', 'config.json', 'tokenizer.json', 'additional_chat_templates/tools.jinja'}
    assert not there & {'README.md', INDEX, 'adapter_config.json', WEIGHTS}


def test_a_model_of_more_than_text_is_called_so(folder):
    edit(folder, model_type='gemma3', text_config=dict(model_type='gemma3_text'), vision_config=dict(hidden_size=8))
    with pytest.raises(ActError, match='multimodal model .gemma3'):
        load_model(folder)


# whatever transformers raises


@pytest.mark.parametrize(
    'change, word',
    [
        (dict(model_type='qwen9'), 'qwen9'),
        (dict(hidden_size=None, num_attention_heads=0), 'model'),
        (dict(dtype='torch.bfloat16', torch_dtype='torch.bfloat16'), 'torch.bfloat16'),
    ],
)
def test_what_transformers_raises_is_one_line(folder, change, word):
    edit(folder, **change)
    with pytest.raises(ActError, match=word) as e:
        load_model(folder)
    assert '\n' not in str(e.value)


# tokenizers


def words():
    t = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(['<unk>', '<pad>', 'what', 'is', 'two', 'plus', '?', '4'])}, unk_token='<unk>'
        )
    )
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return t


@pytest.mark.parametrize('family', ['qwen2', 'llama3', 'gemma3', 'mistral'])
def test_the_tokenizer_gives_the_ids_of_its_file(
    checkpoint, family
):  # transformers would put a class of its own in its place
    folder = checkpoint('model', tiny_model(family))
    words().save(str(folder / 'tokenizer.json'))
    text = 'what is two plus two? 4'
    assert load_tokenizer(folder)(text)['input_ids'] == words().encode(text).ids


def test_special_tokens_come_from_the_configuration(folder):
    tok = load_tokenizer(folder)
    assert (tok.pad_token, tok.bos_token, tok.eos_token) == ('<pad>', '<bos>', '<eos>')
    assert tok('a<eos>')['input_ids'][-1] == toy_tokenizer().eos_token_id


def test_without_a_tokenizer_that_is_said(folder):
    for f in folder.glob('tokenizer*'):
        f.unlink()
    with pytest.raises(ActError, match='no tokenizer that loads'):
        load_tokenizer(folder)


def test_a_model_of_the_cache_that_another_run_makes_is_waited_for(tmp_path):
    home = tmp_path / 'cache'
    lock = os.open(tmp_path / '.cache.lock', os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as another run holds it

    def other_run():
        (home / 'model').mkdir(parents=True)
        os.close(lock)

    timer = threading.Timer(0.3, other_run)
    timer.start()
    assert cached(home / 'model', lambda out: pytest.fail('made a second time')) == home / 'model'
    timer.join()


@pytest.mark.parametrize(
    'kind, word',
    [
        ('gpt2', 'transformer.wte'),
        ('mixtral', 'mixture of experts'),
        ('phi3', 'fused query/key/value'),
        ('gpt_neox', 'gpt_neox.embed_in'),
        ('falcon', 'transformer.word_embeddings'),
    ],
)
def test_an_architecture_that_is_not_covered_is_called_so(tmp_path, kind, word):
    "Its files may hold a shared head once, or experts one by one: they fit their configuration all the same."
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, 'num_hidden_layers': 1}))
    model.save_pretrained(tmp_path / 'model')
    with pytest.raises(ActError, match=word) as e:
        channels_of(tmp_path / 'model')
    assert 'unknown' in str(e.value)
    assert 'lacks' not in str(e.value)
