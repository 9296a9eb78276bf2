"Core: output whole or not at all, errors as one line, provenance that can be traced."

import json, os, shutil, subprocess, sys, pytest
from act.kit.command import command
from act.kit.errors import ActError
from act.kit.files import atomic_file, atomic_folder, exclusive, work_folder
from act.kit.records import git_revision, provenance, sha256, write_json


def test_a_file_that_fails_leaves_the_old_one_and_no_debris(tmp_path):
    write_json({'a': 1}, tmp_path / 'x.json')
    with pytest.raises(RuntimeError):
        with atomic_file(tmp_path / 'x.json') as tmp:
            tmp.write_text('half')
            raise RuntimeError
    assert json.loads((tmp_path / 'x.json').read_text()) == {'a': 1}
    assert os.listdir(tmp_path) == ['x.json']


def test_a_folder_that_fails_never_appears(tmp_path):
    with pytest.raises(RuntimeError):
        with atomic_folder(tmp_path / 'out') as tmp:
            (tmp / 'part').write_text('half')
            raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / 'out').mkdir()
    with pytest.raises(ActError, match='exists already'):
        with atomic_folder(tmp_path / 'out'):
            pytest.fail('the block must not run')


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(ActError, match='appeared'):
        with atomic_folder(tmp_path / 'out') as tmp:
            (tmp / 'a').write_text('ours')
            (tmp_path / 'out').mkdir()
            (tmp_path / 'out' / 'b').write_text('theirs')
    assert os.listdir(tmp_path / 'out') == ['b']
    assert os.listdir(tmp_path) == ['out']


def test_no_room_on_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ActError, match='no room on disk'):
        with atomic_folder(tmp_path / 'out', need=1000):
            pytest.fail('the block must not run')
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_gives_one_error_and_no_debris(tmp_path):
    with pytest.raises(ActError, match='No space left'):
        with atomic_folder(tmp_path / 'out') as tmp:
            (tmp / 'a').write_text('x')
            raise OSError(28, 'No space left on device')
    assert os.listdir(tmp_path) == []


def test_a_path_under_a_file_is_refused(tmp_path):
    (tmp_path / 'f').write_text('')
    with pytest.raises(ActError, match='cannot create the folder'):
        with atomic_file(tmp_path / 'f' / 'g'):
            pass


def test_files_get_the_usual_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / 'o') as tmp:
            (tmp / 'a').write_text('x')
            os.chmod(tmp / 'a', 0o600)
    finally:
        os.umask(old)
    assert (tmp_path / 'o').stat().st_mode & 0o777 == 0o755
    assert (tmp_path / 'o' / 'a').stat().st_mode & 0o777 == 0o644


def test_hashes_of_different_lists_differ():
    assert len({sha256('ab', 'c'), sha256('a', 'bc'), sha256('abc'), sha256('abc', '')}) == 4


def test_provenance_names_revision_versions_and_machine():
    p = provenance(seed=3)
    assert p['git'] == git_revision()
    assert p['seed'] == 3
    assert {'torch', 'transformers', 'lm-eval', 'python', 'act'} <= set(p['versions'])
    assert p['machine']['cores'] == os.cpu_count()
    json.dumps(p)


@command
def half(
    n: int = 4,  # an even number
    loud: bool = False,  # shout
):
    "Halve a number: half --n 4"
    if n % 2:
        raise ActError(f"n is {n}, an odd number: pass an even one")
    print(n // 2)


def test_a_command_reads_options(capsys):
    assert half.main(['--n', '10']) == 0
    assert capsys.readouterr().out == '5\n'


def test_bad_input_is_one_line_and_code_2(capsys):
    assert half.main(['--n', '3']) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err == 'error: n is 3, an odd number: pass an even one\n'


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as e:
        half.main(['--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0
    assert 'an even number' in text
    assert 'half --n 4' in text


def test_the_shell_s_words_are_read_by_main_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['half', '--n', '10'])
    half()
    assert capsys.readouterr().out == '2\n'
    assert half.main() == 0
    assert capsys.readouterr().out == '5\n'


@command
def traced(
    action: str,  # what to do
    out: str = None,  # where
    deep: bool = False,  # more of it
):
    "Print its own record: traced go --out x"
    half(n=2)
    print(json.dumps(provenance().get('argv')))


@pytest.mark.parametrize(
    'call',
    [
        lambda: traced.main(['go', '--out', 'a b', '--deep']),
        lambda: traced('go', out='a b', deep=True),
        lambda: traced('go', 'a b', deep=True),
    ],
)
def test_a_record_holds_the_command_line(call, capsys):
    call()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == ['traced', 'go', '--out', 'a b', '--deep']


def test_no_command_no_command_line(capsys):
    assert 'argv' not in provenance()
    half.main(['--n', '3'])
    assert 'argv' not in provenance()


def test_called_from_python_it_raises():
    with pytest.raises(ActError):
        half(n=3)


def test_a_second_run_into_one_place_is_refused_and_the_first_goes_on(tmp_path):
    code = (
        f"from act.kit.files import work_folder\nwith work_folder('{tmp_path}/out') as w:"
        " (w/'theirs').touch(); print('in', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == 'in\n'
        with pytest.raises(ActError, match='another run is writing'):
            with atomic_folder(tmp_path / 'out'):
                pytest.fail('the block must not run')
        assert (tmp_path / '.out.partial' / 'theirs').exists()
        first.communicate('\n')
        assert first.returncode == 0
    with atomic_folder(tmp_path / 'out') as tmp:
        (tmp / 'a').touch()
    assert os.listdir(tmp_path) == ['out']


@pytest.mark.parametrize('key, left', [('k1', True), ('k2', False), (None, False)])
def test_what_a_killed_run_left_is_found_by_its_like_only(tmp_path, key, left):
    code = (
        f"import os, signal\nfrom act.kit.files import work_folder\nwith work_folder('{tmp_path}/out', 'k1') as w:"
        " (w/'half').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == -9
    with work_folder(tmp_path / 'out', key) as w:
        assert (w / 'half').exists() == left
    assert os.listdir(tmp_path) == []


def test_files_that_a_killed_run_left_are_swept_away(tmp_path):
    code = (
        f"import os, signal\nfrom act.kit.files import atomic_file\nwith atomic_file('{tmp_path}/x.json') as t:"
        " t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == -9
    assert len(os.listdir(tmp_path)) == 2
    write_json(1, tmp_path / 'x.json')
    assert os.listdir(tmp_path) == ['x.json']


def test_a_lock_that_was_just_given_back_is_taken_anew(tmp_path):
    with atomic_file(tmp_path / 'a') as t:
        t.write_text('1')
    with exclusive(tmp_path / 'a'):
        with atomic_file(tmp_path / 'a') as t:
            t.write_text('2')  # the same process may
    assert (tmp_path / 'a').read_text() == '2'
    assert os.listdir(tmp_path) == ['a']
