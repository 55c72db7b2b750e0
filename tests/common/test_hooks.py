"""Forward hooks that say that they do not look at inputs."""

import functools

from s2a_cli.common.hooks import may_read_input, reads_output_only


class Reader:
    @reads_output_only
    def on_output(self, index, module, args, output):
        return output

    def on_both(self, module, args, output):
        return output


def test_a_mark_shows_through_bound_methods_and_partials():
    reader = Reader()
    assert not may_read_input(reader.on_output)
    assert not may_read_input(functools.partial(functools.partial(reader.on_output, 3)))
    assert not may_read_input(reads_output_only(lambda *_: None))
    assert may_read_input(reader.on_both) and may_read_input(functools.partial(reader.on_both))
    assert may_read_input(lambda module, args, output: None)
