"Tiny random models of every covered architecture, and a small byte-level tokenizer, made on the fly."

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
import subprocess, sys
from pathlib import Path
import pytest, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB, SIZES = (
    300,
    dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
)
FAMILIES = dict(
    qwen2={},
    qwen2_untied=dict(tie_word_embeddings=False),
    llama2=dict(num_key_value_heads=4, tie_word_embeddings=False),
    llama3=dict(tie_word_embeddings=False),
    smollm2=dict(tie_word_embeddings=True),
    qwen3=dict(head_dim=8),
    mistral=dict(tie_word_embeddings=False),
    gemma3=dict(head_dim=8),
)
TYPES = dict(qwen2_untied='qwen2', llama2='llama', llama3='llama', smollm2='llama', gemma3='gemma3_text')


def tiny_config(family):
    "A configuration of `family` with about ten thousand parameters."
    kind = TYPES.get(family, family)
    tie = dict(tie_word_embeddings=True) if kind in ('qwen2', 'qwen3', 'gemma3_text') else {}
    return AutoConfig.for_model(kind, **{**SIZES, **tie, **FAMILIES[family]})


def tiny_model(family='qwen2', seed=0, dtype=torch.float32):
    "A random model of `family`; biases and norms are random too, so that a channel left behind shows."
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def toy_tokenizer(eos=True):
    "A byte-level BPE tokenizer of 300 entries with pad, bos and eos."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=['<pad>', '<bos>', '<eos>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(['two plus two is four', 'cuatro y cuatro son ocho', '二加二等于四'] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', bos_token='<bos>', eos_token='<eos>')


SLOW = {'launch', 'browser', 'small_disk'}  # fixtures that start processes


def pytest_collection_modifyitems(items):
    "A test that takes a slow fixture is slow."
    for item in items:
        if SLOW & set(item.fixturenames):
            item.add_marker('slow')


@pytest.fixture(scope='session', params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope='session')
def tokenizer():
    return toy_tokenizer()


@pytest.fixture
def pair():
    return tiny_model('qwen2', 0), tiny_model('qwen2', 1)


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    "A function that saves a tiny model and its tokenizer to a folder: `checkpoint(name, model, **options)`."

    def _save(name, model=None, **kw):
        (model if model is not None else tiny_model()).save_pretrained(tmp_path / name, **kw)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return _save


@pytest.fixture
def run(capsys):
    "Run a command as from a shell: (exit code, stdout, stderr)."
    from helpers import function

    def _run(line):
        name, *args = line.split()
        return function(name).main(args), *capsys.readouterr()

    return _run


@pytest.fixture
def small_disk(tmp_path):
    "A function that mounts a disk of a given size ('4m'), read-only if asked; skips the test where that is forbidden."
    made = []

    def _mount(size, readonly=False):
        at = tmp_path / f'disk{len(made)}'
        at.mkdir()
        try:
            why = subprocess.run(
                ['mount', '-t', 'tmpfs', '-o', f'size={size}' + ',ro' * readonly, 'tmpfs', at],
                capture_output=True,
                text=True,
            ).stderr.strip()
        except OSError as e:
            why = str(e)
        if not os.path.ismount(at):
            pytest.skip(f'a small disk cannot be mounted here: {why}')
        made.append(at)
        return at

    yield _mount
    for at in made:
        subprocess.run(['umount', '-l', at], check=True)


@pytest.fixture
def launch(tmp_path):
    """A function that runs a command, or code given as text, as several processes; with fsdp the model is spread.

    For example `launch('act_finetune', '--model', ...)`.
    """

    def _launch(what, *args, n=2, fsdp=False, timeout=240):
        bin, job = Path(sys.executable).parent, tmp_path / 'job.py'
        if '\n' in what:
            job.write_text(what)
        else:
            job = bin / what
        how = (
            [bin / 'torchrun', '--standalone', f'--nproc_per_node={n}']
            if not fsdp
            else [
                bin / 'accelerate',
                'launch',
                '--use_fsdp',
                '--fsdp_version=2',
                f'--num_processes={n}',
                '--num_machines=1',
                '--mixed_precision=no',
                '--dynamo_backend=no',
                '--main_process_port=0',
            ]
        )
        return subprocess.run(
            [str(o) for o in (*how, job, *args)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=dict(os.environ, OMP_NUM_THREADS='1'),
        )

    return _launch
