"Kills, full or read-only disks, two runs into one place: no wrong or leftover files of transfer, deltas, localisation."

import fcntl, itertools, os, random, subprocess, sys
import pytest, torch
from act import writer
from act.abilities import Ability, Item
from act.loading import channels_of
from act.writer import save_model
from act.kit.errors import ActError
from act.apply import apply_delta
from act.deltas import make_delta
from act.localize import localize
from act.masks import ChannelMask
from act.scores import ChannelScores
from act.streaming import transfer_checkpoint
from conftest import tiny_model
from helpers import files, some


@pytest.fixture
def made(checkpoint):
    a, b = tiny_model(), tiny_model(seed=1)
    return checkpoint('a', a, max_shard_size='6KB'), checkpoint('b', b, max_shard_size='6KB'), some(a)


KILL = """
import itertools, os, signal, sys
from act import writer
from act.masks import ChannelMask
from act.streaming import transfer_checkpoint
a, b, m, *jobs = sys.argv[1:]
real = writer._changed
for out, kill in zip(jobs[::2], jobs[1::2]):
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    blocks = itertools.count()
    def changed(*args):
        if next(blocks) == int(kill):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    writer._changed = changed
    transfer_checkpoint(a, b, ChannelMask.load(m), .5, out)
    os._exit(0)
"""


@pytest.fixture
def counted(monkeypatch):
    "A list that gets an entry for each block that is written."
    blocks, real = [], writer._changed
    monkeypatch.setattr(writer, '_changed', lambda *args: blocks.append(args) or real(*args))
    return blocks


@pytest.mark.slow
def test_a_killed_transfer_is_not_there_and_goes_on_after_the_last_whole_file(made, tmp_path, counted):
    a, b, m = made
    m.save(tmp_path / 'm')
    whole = files(transfer_checkpoint(a, b, m, 0.5, tmp_path / 'whole'))
    every = len(counted)
    kills = {tmp_path / f'out{n}': n for n in random.Random(0).sample(range(every), 4)}
    jobs = [str(o) for job in kills.items() for o in job]
    killed = subprocess.run([sys.executable, '-c', KILL, a, b, tmp_path / 'm', *jobs], capture_output=True, text=True)
    assert killed.stdout.split() == ['-9'] * 4, killed.stderr
    for out in kills:
        assert not out.exists()
        kept = len(list((tmp_path / f'.{out.name}.partial' / 'out').glob('*.safetensors')))
        counted.clear()
        assert files(transfer_checkpoint(a, b, m, 0.5, out)) == whole
        assert (len(counted) < every) == (kept > 0)
    assert not list(tmp_path.glob('.*'))


def test_other_inputs_do_not_take_over_what_a_killed_run_left(made, tmp_path, monkeypatch):
    a, b, m = made
    blocks, real = itertools.count(), writer._changed

    def stopped(*args):
        if next(blocks) == 12:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, '_changed', stopped)
        with pytest.raises(KeyboardInterrupt):
            transfer_checkpoint(a, b, m, 0.5, tmp_path / 'out')
    assert any((tmp_path / '.out.partial').rglob('*.safetensors'))
    other = transfer_checkpoint(a, b, m, 0.7, tmp_path / 'out')
    assert files(other) == files(transfer_checkpoint(a, b, m, 0.7, tmp_path / 'want'))


def test_a_disk_that_fills_up(made, small_disk, tmp_path, monkeypatch):
    a, b, m = made
    disk = small_disk('16k')  # room for a shard or two
    with pytest.raises(ActError, match='no room on disk'):
        transfer_checkpoint(a, b, m, 0.5, disk / 'out')
    monkeypatch.setattr('act.kit.files.check_room', lambda *_: None)  # or it fills up meanwhile
    d = make_delta(a, b, m, 0.5, tmp_path / 'd')
    scores = ChannelScores.from_flat(torch.rand(m.total), m.map, dict(note='x' * 20000))
    for write in (
        lambda: transfer_checkpoint(a, b, m, 0.5, disk / 'out'),
        lambda: apply_delta(a, d, disk / 'out'),
        lambda: make_delta(a, b, m, 0.5, disk / 'd'),
        lambda: scores.save(disk / 's'),
        lambda: save_model(tiny_model(), None, disk / 'out'),
    ):
        with pytest.raises(ActError, match='cannot write .*No space left on device.*free space'):
            write()
        assert os.listdir(disk) == []


def test_a_read_only_folder(made, small_disk, tmp_path):
    a, b, m = made
    disk, d = small_disk('1m', readonly=True), make_delta(a, b, m, 0.5, tmp_path / 'd')
    for write in (
        lambda: transfer_checkpoint(a, b, m, 0.5, disk / 'out'),
        lambda: apply_delta(a, d, disk / 'out'),
        lambda: make_delta(a, b, m, 0.5, disk / 'd'),
        lambda: m.save(disk / 's'),
    ):
        with pytest.raises(ActError, match='is read-only: choose another output path'):
            write()


def test_the_disk_of_waiting_activations_fills_up(checkpoint, small_disk):
    a, b, items = (
        checkpoint('a'),
        checkpoint('b', tiny_model(seed=1)),
        Ability('x', [Item('a', ' and so on' * 20)] * 20),
    )
    disk = small_disk('40k')
    with pytest.raises(ActError, match='cannot write .*No space left on device'):
        localize(a, b, items, hold='one', state=disk, disk=10**9, progress=False)
    assert os.listdir(disk) == []


@pytest.mark.parametrize(
    'command',
    [
        'act_transfer --mask {m} --out {out}',
        'act_localize --ability lab/science-zh --out {out}',
        'act_delta --mask {m} --out {out}',
    ],
)
def test_a_second_run_into_one_place_is_refused_at_once(command, tmp_path, run):
    m, out = tmp_path / 'm', tmp_path / 'out'
    channels = channels_of('lab/base')
    ChannelMask.from_flat(torch.arange(channels.total) % 20 == 0, channels).save(m)
    lock = os.open(tmp_path / '.out.lock', os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as another run holds it
    code, _, said = run(f'{command.format(m=m, out=out)} --target lab/maths-en --donor lab/base')
    os.close(lock)
    assert code == 2
    assert 'another run is writing' in said
    assert not out.exists()
