"""What a model file names is never imported, unpickled or run."""

import subprocess
import sys

from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf

HOSTILE = {
    "general.name": "evil_module.Model",
    "general.auto_map": "evil_module--Model",
    "auto_map": ["evil_module.Config", "evil_module.Model"],
    "custom_code": "import evil_module",
    "torch.pickle": "cevil_module\nrun\n(tR.",
    "tokenizer.auto_map": "evil_module.Tokenizer",
}
TEMPLATE = (
    "{{ messages[0]['content'] }}{{ namespace }}"
    "{% if false %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endif %}"
)

WATCHED = """
import sys
from qwen3_moe_jax import Sampling, load
clean, hostile = sys.argv[1:]

def use(path):
    with load(path, backend="reference", gate=False) as model:
        model.generate("a b", max_tokens=4, sampling=Sampling(temperature=0))
        model.generate([{"role": "user", "content": "hi"}], max_tokens=2)

use(clean)
seen, before = [], set(sys.modules)
# A template becomes code of jinja2 in a sandbox, in another process; this one must see none of these.
FORBIDDEN = ("import", "pickle.find_class", "marshal.loads", "ctypes.dlopen", "socket.connect", "os.system")

def hook(name, arguments):
    if name in FORBIDDEN and not (name == "import" and arguments[0] in before):
        seen.append((name, str(arguments[0])))

sys.addaudithook(hook)
use(hostile)
print(seen, sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_loading_a_hostile_file_imports_and_unpickles_nothing(tmp_path):
    """The first file has made all imports; the second names a module that lies in the search path."""
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    clean, hostile = tmp_path / "clean.gguf", tmp_path / "hostile.gguf"
    template = {"tokenizer.chat_template": TEMPLATE}
    write_random_gguf(clean, SMALL, metadata={"tokenizer.chat_template": "{{ messages[0]['content'] }}"})
    write_random_gguf(hostile, SMALL, metadata={**HOSTILE, **template})
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{WATCHED}",
            clean,
            hostile,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[] []\n"
    assert not (tmp_path / "ran").exists()
