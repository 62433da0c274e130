"""Hostile chat templates: nothing is executed, and every bomb ends within its CPU and memory limits."""

import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from qwen3_moe_jax.text import chat_template, template_worker
from qwen3_moe_jax.text.chat_template import TemplateError, render_chat

USER = [{"role": "user", "content": "hi"}]

_RUN = ".popen('touch MARKER').read()"
INJECTIONS = {
    "class_mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "subclass_loop": "{% for c in ''.__class__.__base__.__subclasses__() %}{% if c.__name__ == 'Popen' %}"
    "{{ c(['touch', 'MARKER']) }}{% endif %}{% endfor %}",
    "cycler_globals": "{{ cycler.__init__.__globals__.os" + _RUN + " }}",
    "joiner_globals": "{{ joiner.__init__.__globals__['os']" + _RUN + " }}",
    "namespace_globals": "{{ namespace.__init__.__globals__.os" + _RUN + " }}",
    "lipsum_globals": "{{ lipsum.__globals__['os']" + _RUN + " }}",
    "attr_filter": "{{ (lipsum | attr('__globals__'))['os']" + _RUN + " }}",
    "map_attribute": "{{ ([lipsum] | map(attribute='__globals__') | first)['os']" + _RUN + " }}",
    "format_string": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "indirect_format": "{{ ['{0.__globals__}'] | map('format', raise_exception) | first }}"
    "{% set f = '{0.__globals__}'.format %}{{ f(strftime_now) }}",
    "raise_exception_globals": "{{ raise_exception.__globals__['sys'].modules['os']" + _RUN + " }}",
    "self_and_context": "{{ self.__init__.__globals__.__builtins__['__import__']('os')" + _RUN + " }}",
    "change_an_input": "{% set x = messages.append({'role': 'user', 'content': 'evil'}) %}",
    "import_module": "{% import 'os' as os %}{{ os" + _RUN + " }}",
}


@pytest.mark.smoke
@pytest.mark.parametrize("payload", INJECTIONS)
def test_an_injection_executes_nothing(payload, tmp_path):
    marker = tmp_path / "executed"
    with pytest.raises(TemplateError):
        render_chat(INJECTIONS[payload].replace("MARKER", str(marker)), USER)
    assert not marker.exists()


_LOOP = "{% for i in range(99999) %}"
BOMBS = {
    "nested_loops": _LOOP * 3 + "{% endfor %}" * 3,
    "loops_with_output": _LOOP * 2 + "xxxxxxxx" + "{% endfor %}" * 2,
    "constant_power": "{{ 10**(10**9) }}",
    "power": "{% set n = messages | length %}{{ (n + 9)**((n + 9)**8) }}",
    "big_integer_loop": "{% set ns = namespace(x=3) %}" + _LOOP + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "integer_to_text": "{% set n = (messages | length + 9)**1000000 %}{{ n % 7 }}{{ n * n % 7 }}" + _LOOP
    + "{{ n // 3 % 2 }}{% endfor %}",
    "macro_recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching_recursion": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "loop_recursion": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "string_doubling": "{% set ns = namespace(x='a') %}" + _LOOP + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "list_doubling": "{% set ns = namespace(x=[1]) %}" + _LOOP + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "string_times": "{{ 'x' * 10**9 }}",
    "percent_width": "{{ '%1000000000d' % 1 }}",
    "format_width": "{{ '{:>1000000000}'.format('x') }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "indent": "{{ ('x\n' * 10000) | indent(1000000) }}",
    "long_range": "{{ range(10**12) | list | length }}",
    "batch_of_lists": _LOOP + "{% set x = range(99999) | list %}{% endfor %}",
    "sort_in_a_loop": _LOOP + "{% set x = range(99999) | sort %}{% endfor %}",
    "lipsum": "{{ lipsum(n=100000, max=10000) }}",
    "nested_source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested_blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "nested_lists": "{{ " + "[" * 3000 + "]" * 3000 + " | tojson }}",
    "replace_growth": "{% set ns = namespace(x='a') %}" + _LOOP
    + "{% set ns.x = ns.x | replace('a', 'aaaaaaaaaa') %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_ends_within_its_limits(bomb):
    """By the limits of CPU time, memory or output, or refused; never by the deadline, which is for hangs."""
    with pytest.raises(TemplateError) as caught:
        render_chat(BOMBS[bomb], USER)
    assert "it takes longer than" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_kernel_ends_a_loop_that_uses_no_memory():
    assert template_worker.CPU_SECONDS < 0.5
    with pytest.raises(TemplateError, match=r"it takes more than 0\.45 s of CPU time"):
        render_chat(BOMBS["nested_loops"], USER)


def test_a_memory_bomb_says_so():
    with pytest.raises(TemplateError, match="it needs more than 256 MiB of memory"):
        render_chat("{% set x = messages[0].content * 900000000 %}{{ x }}", USER)  # one request, no time


def test_output_is_bounded_by_the_input():
    with pytest.raises(TemplateError, match=r"it writes more than 10\d{5} characters"):
        render_chat("{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}", USER)


def test_the_next_rendering_after_a_death_works():
    for bomb in ("nested_loops", "power"):
        with pytest.raises(TemplateError):
            render_chat(BOMBS[bomb], USER)
        assert render_chat("{{ messages[0].content }}", USER).text == "hi"


def test_a_child_that_was_killed_is_replaced():
    render_chat("x", USER)
    os.kill(chat_template._renderer()._process.pid, signal.SIGKILL)
    chat_template._renderer()._process.wait()
    assert render_chat("{{ messages[0].content }}", USER).text == "hi"


def test_an_interrupted_request_does_not_answer_the_next_one(monkeypatch):
    def interrupted(process, content):
        process.stdin.write(len(content).to_bytes(4, "big") + content)
        process.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "_exchange_frames", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render_chat("old", USER)
    assert render_chat("new", USER).text == "new"


def test_a_child_that_cannot_start(monkeypatch):
    chat_template._renderer().close()
    monkeypatch.setattr(chat_template.sys, "executable", "/nowhere/python")
    with pytest.raises(TemplateError, match="cannot start"):
        render_chat("x", USER)


def test_a_child_that_dies_at_its_start(monkeypatch):
    chat_template._renderer().close()
    monkeypatch.setattr(chat_template.sys, "executable", "/bin/false")
    with pytest.raises(TemplateError, match="ended with status 1"):
        render_chat("x", USER)


def test_the_deadline_ends_what_the_cpu_limit_does_not(monkeypatch):
    render_chat("x", USER)
    monkeypatch.setattr(chat_template, "DEADLINE_SECONDS", 0.3)
    os.kill(chat_template._renderer()._process.pid, signal.SIGSTOP)
    with pytest.raises(TemplateError, match=r"it takes longer than 0\.3 s"):
        render_chat("x", USER)
    monkeypatch.undo()
    assert render_chat("x", USER).text == "x"


def test_too_large_an_input_is_refused_before_it_is_sent(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_INPUT_BYTES", 1000)
    with pytest.raises(chat_template.MessageError, match="more than 1000"):
        render_chat("x", [{"role": "user", "content": "x" * 1000}])


def test_threads_share_one_child():
    texts: list[str] = []

    def work(i: int) -> None:
        texts.append(render_chat("{{ messages[0].content }}", [{"role": "user", "content": f"{i}"}]).text)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts, key=int) == [f"{i}" for i in range(16)]


def test_the_child_has_limits_and_no_environment():
    render_chat("x", USER)
    pid = chat_template._renderer()._process.pid
    assert resource.prlimit(pid, resource.RLIMIT_AS) == (template_worker.MEMORY_BYTES,) * 2
    assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)
    variables = {
        entry.split(b"=")[0] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if entry
    }
    assert variables <= {b"TZ", b"LD_LIBRARY_PATH"}


def test_the_child_does_not_import_the_project_or_jax():
    render_chat("x", USER)
    maps = Path(f"/proc/{chat_template._renderer()._process.pid}/maps").read_text()
    assert "jaxlib" not in maps
    assert "numpy" not in maps
