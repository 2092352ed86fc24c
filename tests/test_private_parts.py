"Private parts of other packages that the library uses are few, and all in a table that says why"
import ast, configparser, sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
import pytest, torch
from packaging.requirements import Requirement
from packaging.version import Version
from adverfine.data.images import GreyImage

root = Path(__file__).resolve().parents[1]

# The newest versions they were tried with; the oldest are the floors of settings.ini, which tools/floors installs
newest = {'torch': '2.14.1', 'fastai': '2.8.12', 'fastcore': '2.2.39', 'torch-pruning': '1.6.1', 'ray': '2.60.0'}

# name, `._x` where the object is not an imported one -> what for, and why there is no public one
private_parts = {
    '._forward_hooks': "fused layers would leave out the hooks of the layers they replace: no public way to ask for "
                       "hooks",
    '._forward_pre_hooks': "as _forward_hooks",
    '._backward_hooks': "as _forward_hooks",
    '._backward_pre_hooks': "as _forward_hooks",
    '._orig_mod': "the network in torch.compile's wrapper: the wrapper has no public class, and no public way in",
    '._compiled_call_impl': "undoes Module.compile() in place: torch only sets it, and torch.compiler.set_stance, "
                            "which can suspend it, costs every pruning the import of the compiler, 5 to 30 seconds",
    '._conv_forward': "a convolution with another weight that pads as the layer does: F.conv2d knows zeros alone",
    '._broadcast': "fastai's DistributedDL sends the order of images by NCCL's way, and has no other place to say how",
    'torch.ops.mkldnn._convolution_pointwise': "convolution and ReLU in one kernel: reachable by torch.compile alone, "
                                               "which compiles anew after each pruning",
    'torch._export.utils._is_cia_op': "keeps the kernels that integer patterns are written for: "
                                      "default_decompositions() does not say which of its entries are composite",
    'torch._inductor.constant_folding.constant_fold': "integer weights are rounded once: only Inductor has it",
    'torch._inductor.fx_passes.freezing_patterns.freezing_passes':
        "puts integer kernels into the graph: only Inductor has it",
    'torch._inductor.compile_fx.compile_fx':
        "a program that can be called without guards: torch.compile gives guarded ones",
    'ray._private.ray_constants': "a cluster that listens at 127.0.0.1 alone: Ray looks for it at the machine's other "
                                  "address, and has a variable for that which it reads only while it is imported",
    'torch._inductor.config': "freezing has to hold for Dynamo too, which torch.compile(options=...) does not reach"}

_loaders = 'import_module', 'find_spec', 'resolve_name'

def _is_private(o): return o.startswith('_') and o.strip('_')!='' and not o.startswith('__')

def _attribute(node):
    "The object and the name that `node` asks it for, by a dot or by a string; None if it is neither"
    def text(o): return o.value if isinstance(o, ast.Constant) and isinstance(o.value, str) else None
    def inside(o): return o.args[0] if isinstance(o, ast.Call) and ast.unparse(o.func)=='vars' and o.args else None
    if isinstance(node, ast.Attribute): return node.value,node.attr
    if isinstance(node, ast.Subscript): obj,name = inside(node.value),node.slice
    elif isinstance(node, ast.Compare): obj,name = inside(node.comparators[0]),node.left
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and inside(node.func.value) and node.args:
        obj,name = inside(node.func.value),node.args[0]
    elif isinstance(node, ast.Call) and len(node.args)>1 and ast.unparse(node.func).split('.')[-1].strip('_') in (
        'getattr', 'setattr', 'hasattr', 'delattr'): obj,name = node.args[:2]
    else: return None
    return (obj,text(name)) if obj is not None and text(name) else None

def _members(tree):
    "Names of attributes that the library itself gives to objects"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for o in node.body:
                targets = o.targets if isinstance(o, ast.Assign) else [getattr(o, 'target', None)]
                yield from (t.id for t in targets if isinstance(t, ast.Name))
                yield getattr(o, 'name', '')
        elif isinstance(node, ast.FunctionDef):
            if any(ast.unparse(o).startswith('patch') for o in node.decorator_list): yield node.name
        elif isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store) and ast.unparse(node.value)=='self': yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func)=='object.__setattr__' and (a := _attribute(node)):
            yield a[1]

def _imported(node):
    "(name inside the module, full name) of what an import statement brings from other packages"
    if isinstance(node, ast.Import):
        for o in node.names:
            first = o.name.split('.')[0]
            yield (o.asname, o.name, o.name) if o.asname else (first, first, o.name)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        for o in node.names: yield o.asname or o.name, f'{node.module}.{o.name}', f'{node.module}.{o.name}'

def _in_module(tree, own):
    "(line, name) of each private part that a module uses"
    nodes = list(ast.walk(tree))
    imports = [(n.lineno, *o) for n in nodes for o in _imported(n) if o[1].split('.')[0]!='adverfine']
    full = {alias: name for _,alias,name,_ in imports}
    rooms = {o.asname or o.name for n in nodes if isinstance(n, ast.ImportFrom) for o in n.names
             if n.module=='adverfine' or n.level and not n.module}
    def dotted(node):
        if isinstance(node, ast.Name): return node.id
        return f'{dotted(a[0])}.{a[1]}' if (a := _attribute(node)) else '?'
    yield from ((line, name) for line,*_,name in imports if any(map(_is_private, name.split('.'))))
    within = {a[0] for n in nodes if (a := _attribute(n)) and isinstance(a[0], ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func).split('.')[-1] in _loaders:
            name = str(getattr(node.args[0], 'value', ''))
            if any(map(_is_private, name.split('.'))): yield node.lineno, name
        if not (found := _attribute(node)): continue
        first,*rest = dotted(node).split('.')
        if first in full:
            if node not in within and any(map(_is_private, rest)): yield node.lineno, '.'.join([full[first], *rest])
        elif _is_private(found[1]) and found[1] not in own and first not in rooms: yield node.lineno, '.'+found[1]

def uses(
    sources:dict, # name of a module -> its text
) -> dict: # private part -> where it is used
    "The private parts of other packages that the library uses"
    trees = {k: ast.parse(v) for k,v in sources.items()}
    own,found = {o for t in trees.values() for o in _members(t)},{}
    for k,t in trees.items():
        for line,name in _in_module(t, own): found.setdefault(name, []).append(f'{k}.py:{line}')
    return found

def overridden():
    "Private parts of classes elsewhere that the library's classes give another value; a metaclass's own do not count"
    found = {}
    for p in sorted((root/'adverfine').rglob('*.py')):
        if p.stem in ('__init__', '_modidx', 'all'): continue
        module = import_module('.'.join(p.relative_to(root).with_suffix('').parts))
        own = set(_members(ast.parse(p.read_text())))
        for cls in (o for o in vars(module).values() if isinstance(o, type) and o.__module__==module.__name__):
            for name in filter(_is_private, own & set(vars(cls))):
                others = (o for o in cls.__mro__[1:] if not o.__module__.startswith('adverfine'))
                base = next((o for o in others if name in vars(o)), None)
                if not base: continue
                full = f'{base.__module__}.{base.__qualname__}.{name}'
                found.setdefault(full, []).append(f'{p.name}: {cls.__name__}')
    return found

def check(found, table):
    new = {k: v for k,v in found.items() if k not in table}
    assert not new, (f'private parts that no table lists: {new}. '
                     'Use public ones, or say in `private_parts` why there are none')
    gone = sorted(set(table)-set(found))
    assert not gone, f'private parts that nothing uses any more: {gone}. Take them out of `private_parts`'

def test_private_parts_are_those_of_the_table():
    sources = {'/'.join(p.relative_to(root).with_suffix('').parts): p.read_text()
               for p in (root/'adverfine').rglob('*.py')}
    check(uses(sources) | overridden(), private_parts)

seen = {
    'import torch._dynamo': 'torch._dynamo', 'import torch._dynamo as d': 'torch._dynamo',
    'from torch import _dynamo': 'torch._dynamo',
    'def f():\n    from fastai._nbdev import modules': 'fastai._nbdev.modules',
    'import torch\ntorch._C._x(1)': 'torch._C._x', 'import torch as t\nt._C.y': 'torch._C.y',
    'from torch import nn\nnn.modules.conv._ConvNd': 'torch.nn.modules.conv._ConvNd',
    'import torch, torch.nn.functional as F\nF._pad(x)': 'torch.nn.functional._pad',
    'from fastai.learner import Learner\nLearner._split': 'fastai.learner.Learner._split',
    'import torch_pruning as tp\nclass A(tp.pruner._Base): pass': 'torch_pruning.pruner._Base',
    "import torch\ngetattr(torch.cpu, '_amx', bool)": 'torch.cpu._amx', "hasattr(m, '_x')": '._x', 'm.a._x.b': '._x',
    "import_module('torch.ao._y')": 'torch.ao._y',
    "vars(m).pop('_x', None)": '._x', "vars(m)['_x']": '._x', "'_x' in vars(m)": '._x',
    'self._x(1)': '._x', 'm._x = 1': '._x', 'f()._x': '._x', 'def _x(): pass\ndef f(dl): dl._x = _x': '._x'}

@pytest.mark.parametrize('source', seen)
def test_a_new_private_part_is_seen(source):
    "Whatever the way to it; and the table has to lose what is no longer used"
    found = uses(dict(room=source))
    assert list(found)==[seen[source]]
    with pytest.raises(AssertionError, match='Use public ones'): check(found, {})
    with pytest.raises(AssertionError, match='Take them out'): check({}, dict.fromkeys(found, 'why'))
    check(found, dict.fromkeys(found, 'why'))

@pytest.mark.parametrize('source', [
    'class A:\n    _x = 1\n    def _y(self): self._z = self._x\n    def y(self): return self._y()+self._z',
    'from .models import _x\n_x(1)',
    'from adverfine import study\nstudy._x', '@patch\ndef _x(self:Learner): pass\ndef f(learn): learn._x()',
    "class A:\n    def f(self): object.__setattr__(self, '_x', 1); return self._x",
    'import torch\ntorch.nn.Linear.__init__',
    'def f(_x): return _x.y', "for _,x in y: print('_x')", 'from torch import nn\nnn.init.zeros_(x)'])
def test_own_and_public_parts_are_not_private_ones(source): assert uses(dict(room=source))=={}

def test_a_private_part_that_is_overridden_is_seen(monkeypatch):
    "As `_show_args` of fastai's images was: no dot leads to it"
    monkeypatch.setattr(GreyImage, '_show_args', {}, raising=False)
    monkeypatch.setattr(sys.modules[__name__], '_members', lambda tree: ['_show_args'])
    assert overridden()=={'fastai.torch_core.TensorImageBase._show_args': ['images.py: GreyImage']}

@pytest.mark.parametrize('name', [o for o in private_parts if not o.startswith('.')])
def test_private_parts_are_there(name):
    if name.startswith('torch.ops.mkldnn.') and not torch.backends.mkldnn.is_available():
        pytest.skip('torch without oneDNN')
    resolve_name(name)

@pytest.mark.parametrize('package', newest)
def test_versions_that_they_were_tried_with(package):
    "What is installed is no older than the floor in settings.ini, from where on they were tried"
    cp = configparser.ConfigParser(delimiters=['='], interpolation=None)
    cp.read(root/'settings.ini')
    lists = [v for k,v in cp['DEFAULT'].items() if k.endswith('requirements')]
    needs = [Requirement(o.partition('#')[0]) for text in lists for o in text.splitlines()]
    floor = next(s.version for r in needs if r.name==package for s in r.specifier if s.operator=='>=')
    assert Version(newest[package])>=Version(floor) and Version(version(package))>=Version(floor)
