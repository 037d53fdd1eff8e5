"""Standard output: whatever others print while a suite runs goes to stderr."""

import os
import subprocess

from simulations.report.progress import only_ours_on_stdout


def test_other_programs_write_to_stderr_until_it_is_given_back(capfd):
    with only_ours_on_stdout():
        os.write(1, b"a library\n")
        subprocess.run(["echo", "a program"], check=True)
    os.write(1, b"ours\n")

    out, err = capfd.readouterr()
    assert out == "ours\n"
    assert "a program" in err and "a library" in err
