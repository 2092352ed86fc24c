"What an import does to others: nothing"
import json, subprocess, sys
import pytest

def _run(code):
    "What a fresh Python answers, as JSON on its last line"
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert not out.returncode, out.stderr
    return json.loads(out.stdout.splitlines()[-1])

snapshot = '''
import json, sys, types
import fastai.vision.all, fastai.callback.all, fastcore.all
import torch, torch.nn, torch.optim, torch.nn.functional, torchvision, torch_pruning, safetensors.torch
try: import accelerate, fastai.distributed
except ImportError: pass

others = 'fastai fastcore torch torchvision torch_pruning safetensors numpy pandas PIL'.split()
def owned(m): return m.split('.')[0] in others
def seen():
    "Each function, class and attribute of a class in modules of others"
    found = {}
    for name,module in list(sys.modules.items()):
        if not owned(name) or not isinstance(module, types.ModuleType): continue
        for k,v in list(vars(module).items()):
            found[name, k] = v
            if isinstance(v, type) and owned(getattr(v, '__module__', '') or ''):
                for a,w in list(vars(v).items()): found[v.__module__+'.'+v.__qualname__, a] = w
    return found
'''

def test_import_changes_nothing_of_others():
    "No function, class or method of another library is replaced; what is added are the verbs of a Learner"
    changed,added = _run(snapshot+'''
before = seen()
import adverfine.all, adverfine.bench.recipes, adverfine.bench.inference, adverfine.cli
after = seen()
plain = (types.FunctionType, types.MethodType, type, property, classmethod, staticmethod, types.BuiltinFunctionType)
changed = [k for k,v in before.items() if isinstance(v, plain) and (k not in after or after[k] is not v)]
added = [k for k in after if k not in before and k[0]=='fastai.learner.Learner']
print(json.dumps([changed, added]))''')
    assert not changed
    verbs = 'prune quantize frozen_copy robustness save_compressed adversarial_fine_tune export_onnx push_to_hub'
    assert {k for _,k in added}==set(verbs.split())

def test_the_test_would_notice():
    changed = _run(snapshot+'''
before = seen()
fastai.learner.Learner.predict = lambda self: 0
torch.nn.Linear = int
after = seen()
plain = types.FunctionType, type
changed = [list(map(str, k)) for k,v in before.items() if isinstance(v, plain) and after[k] is not v]
print(json.dumps(changed))''')
    assert ['fastai.learner.Learner', 'predict'] in changed and ['torch.nn', 'Linear'] in changed

def test_import_tells_the_c_library_nothing():
    "Memory is kept by a fit, not by an import"
    assert _run('''
import ctypes, json
calls,real = [],ctypes.CDLL
class Spy:
    def __init__(self, *args, **kwargs): self.lib = real(*args, **kwargs)
    def __getattr__(self, k):
        calls.append(k)
        return getattr(self.lib, k)
import torch, torchvision, fastai.vision.all
ctypes.CDLL = Spy
import adverfine.all
print(json.dumps([calls]))''')==[[]]

def test_no_name_of_fastai_changes_its_meaning():
    import fastai.vision.all as theirs, adverfine.all as ours
    changed = [k for k in vars(theirs) if not k.startswith('_') and getattr(ours, k) is not getattr(theirs, k)]
    assert not changed
    added = [k for k,v in vars(ours).items() if not k.startswith('_') and k not in vars(theirs)]
    assert 50<=len(added)<=80 and not {'metric', 'look', 'budget', 'guard'} & set(added)

@pytest.mark.parametrize('told,kept', [(None, True), ('0', False)])
def test_keeping_memory_can_be_turned_off(monkeypatch, told, kept):
    from adverfine.training import acceleration
    calls = []
    class Library:
        def mallopt(self, what, value):
            calls.append(what)
            return 1
    monkeypatch.setattr(acceleration.ctypes, 'CDLL', lambda name: Library())
    monkeypatch.delenv('ADVERFINE_KEEP_MEMORY', raising=False)
    if told is not None: monkeypatch.setenv('ADVERFINE_KEEP_MEMORY', told)
    assert acceleration.keep_memory() is kept and bool(calls) is kept

def test_a_distributed_fit_leaves_fastai_as_it_is():
    "One gloo process: its own loaders send the order of images another way, fastai's class does not"
    pytest.importorskip('accelerate')
    assert _run('''
import json, os, torch, torch.distributed as dist
os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0',
    ACCELERATE_USE_CPU='true')
from fastai.distributed import DistributedDL
from adverfine.training.acceleration import agree_on_cpu
from adverfine.data.sources import digits_dls
before = DistributedDL._broadcast
dls = digits_dls(n_train=100)
import tempfile
dist.init_process_group('gloo', init_method=f'file://{tempfile.mkdtemp()}/meet', rank=0, world_size=1)
dls.loaders = [DistributedDL(dl, 0, 1) for dl in dls.loaders]
agree_on_cpu(dls)
order = dls.train.get_idxs()
dist.destroy_process_group()
print(json.dumps([DistributedDL._broadcast is before, sorted(order)==list(range(90))]))''')==[True, True]
