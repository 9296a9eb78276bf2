"Kills, full or read-only disks, two runs into one place: no wrong or leftover files of transfer, deltas, localisation."

import os, random, subprocess, sys
import pytest, torch
from act.abilities import Ability, Item
from act.loading import channels_of
from act.writer import save_model
from act.kit.errors import ActError
from act.apply import apply_delta
from act.deltas import make_delta
from act.localize import localize
from act.scores import ChannelScores
from act.streaming import transfer_checkpoint
from conftest import tiny_model
from helpers import files, some


@pytest.fixture
def made(checkpoint):
    a, b = tiny_model(), tiny_model(seed=1)
    return checkpoint('a', a, max_shard_size='6KB'), checkpoint('b', b, max_shard_size='6KB'), some(a)


CODE = """
import os, signal, sys
from act import writer
from act.streaming import transfer_checkpoint
from act.masks import ChannelMask
a, b, m, out, kill = sys.argv[1:]
count, real = 0, writer._changed
def counted(*args):
    global count
    count += 1
    if count > int(kill): os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
writer._changed = counted
transfer_checkpoint(a, b, ChannelMask.load(m), .5, out)
print(count)
"""


@pytest.mark.slow
def test_a_killed_transfer_is_not_there_and_goes_on_after_the_last_whole_file(made, tmp_path):
    a, b, m = made
    m.save(tmp_path / 'm')
    run = lambda out, kill: subprocess.run(
        [sys.executable, '-c', CODE, a, b, tmp_path / 'm', tmp_path / out, str(kill)], capture_output=True, text=True
    )
    blocks = int(run('whole', 1000).stdout)
    for kill in random.Random(0).sample(range(blocks), 4):
        assert run(f'out{kill}', kill).returncode == -9 and not (tmp_path / f'out{kill}').exists()
        kept = len(list((tmp_path / f'.out{kill}.partial' / 'out').glob('*.safetensors')))
        again = run(f'out{kill}', 1000)
        assert files(tmp_path / f'out{kill}') == files(tmp_path / 'whole') and not list(tmp_path.glob('.*'))
        assert (int(again.stdout) < blocks) == (kept > 0)


def test_other_inputs_do_not_take_over_what_a_killed_run_left(made, tmp_path, checkpoint):
    a, b, m = made
    m.save(tmp_path / 'm')
    assert subprocess.run([sys.executable, '-c', CODE, a, b, tmp_path / 'm', tmp_path / 'out', '12']).returncode == -9
    assert files(transfer_checkpoint(a, b, m, 0.7, tmp_path / 'out')) == files(
        transfer_checkpoint(a, b, m, 0.7, tmp_path / 'want')
    )


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
@pytest.mark.slow
def test_a_second_run_into_one_place_is_refused_at_once(command, tmp_path):
    m, out = tmp_path / 'm', tmp_path / 'out'
    from act.masks import ChannelMask

    cm = channels_of('lab/base')
    ChannelMask.from_flat(torch.arange(cm.total) % 20 == 0, cm).save(m)
    name, *args = command.format(m=m, out=out).split()
    holder = subprocess.Popen(
        [
            sys.executable,
            '-c',
            f"from act.kit.files import exclusive\nwith exclusive('{out}'): print('in', flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == 'in\n'
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), name), '--target', 'lab/maths-en', '--donor', 'lab/base', *args],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and 'another run is writing' in done.stderr and not out.exists()
    holder.communicate('\n')
