"What a builder meets: a dozen names, imported when they are asked for."

import subprocess
import sys
import pytest
import act


def printed(code):
    "What a fresh interpreter prints."
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_alone_imports_no_library():
    assert printed("import act, sys; print('torch' in sys.modules or 'transformers' in sys.modules)") == 'False'


def test_every_name_is_there():
    from act import Ability, ChannelMask, evaluate, finetune, load_ability, load_model, localize, top_p, transfer

    assert all(callable(f) for f in (Ability, ChannelMask, evaluate, finetune, load_ability, load_model))
    assert localize.__module__ == 'act.localize'
    assert transfer.__module__ == 'act.transfer'
    assert top_p is act.top_p


@pytest.mark.parametrize('first', ['from act.transfer import mask_slices', 'import act; act.transfer', 'pass'])
def test_a_stage_is_the_function_whatever_was_imported_first(first):
    code = f'{first}\nfrom act import transfer\nfrom act.transfer import transfer as same\nprint(transfer is same)'
    assert printed(code) == 'True'


def test_another_name_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        act.nothing
