"""Do the tests bite? Put faults into the code one by one and see which go unnoticed

    python tools/mutants.py                                    # 30 faults in each module, with the seed 0
    python tools/mutants.py --module threat compression.plan   # in these only
    python tools/mutants.py --again --no-pages                 # run more tests on the survivors

A fault ("mutant") is a changed number, sign, comparison, condition or call. It is put into the module *and* into the
cell of the notebook that the module was made from, in a copy of the project; then what belongs to the module runs, the
quickest first, until something fails. What fails with the mutant, or takes three times as long as without and a minute
more, has killed it. Results are kept in a file each under `--out`, so that an interrupted run goes on; survivors that
do not matter are named, with the reason, in `tools/mutants.csv`. Not part of the continuous integration: it takes
minutes for each module.
"""
import argparse, ast, csv, hashlib, json, multiprocessing as mp, os, random, re, shutil, signal, sys, time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

root = Path(__file__).resolve().parents[1]
os.environ.update(OMP_NUM_THREADS='1', MPLBACKEND='agg')

# What belongs to a module besides its own page: tests, and other pages, as arguments of pytest
_attacks = ['tests/test_attacks.py', 'tests/test_gradient_attacks.py']
_autoattack = ['tests/test_autoattack.py']
_escalation = 'tests/test_escalation.py'
_state = 'tests/test_state.py'
_transferred = 'tests/test_evaluation.py -k normalised'
_pruning = ['tests/test_pruning.py']
_quantization = ['tests/test_quantization.py']
_deployment = ['tests/test_deployment.py']
_training = ['tests/test_training.py']
_study = ['tests/test_study.py', 'tests/test_study_values.py', 'tests/test_study_own.py']
_page = ['tests/test_page.py']
def _sees(words): return f'tests/test_compression.py -k "{words}"'

belongs = {
    'threat':                   ['tests/test_threat.py', 'tests/test_norms.py'],
    'files':                    ['tests/test_files.py'],
    'networks.zoo':             ['tests/test_checkpoint.py'],
    'networks.modes':           ['tests/test_attacks.py'],
    'networks.layers':          ['tests/test_checkpoint.py', *_pruning],
    'networks.attention':       [*_pruning, _sees('head or attention or transformer')],
    'networks.optimizers':      [*_pruning, _sees('optimizer or state_is_cut')],
    'networks.cost':            ['tests/test_cost.py'],
    'networks.precision':       ['tests/test_attacks.py', 'tests/test_training.py -k "bf16 or precision"'],
    'networks.fused':           ['tests/test_fused.py'],
    'networks.timings':         ['tests/test_fastest.py'],
    'networks.fastest':         ['tests/test_fastest.py'],
    'data.images':              ['tests/test_data.py'],
    'data.pixels':              ['tests/test_data.py', *_pruning],
    'data.sources':             ['tests/test_data.py'],
    'data.folders':             ['tests/test_study_own.py'],
    'attacks.attack':           _attacks,
    'attacks.losses':           [*_attacks, *_autoattack],
    'attacks.scoring':          ['tests/test_passes.py', 'tests/test_report.py', _state, *_attacks],
    'attacks.standing':         [*_autoattack, 'tests/test_attacks.py'],
    'attacks.gradient':         ['tests/test_gradient_attacks.py', 'tests/test_sparse_attacks.py'],
    'attacks.adaptive':         [*_attacks, 'tests/test_random_networks.py', _transferred, 'tests/test_passes.py'],
    'attacks.torchattacks':     ['tests/test_attacks.py'],
    'attacks.apgd':             _autoattack,
    'attacks.saturated':        ['tests/test_saturated.py'],
    'attacks.fab':              _autoattack,
    'attacks.fmn':              ['tests/test_fmn.py'],
    'attacks.square':           [*_autoattack, 'tests/test_sparse_attacks.py'],
    'attacks.triage':           [*_autoattack, _escalation],
    'attacks.autoattack':       _autoattack,
    'attacks.surrogates':       ['tests/test_passes.py', 'tests/test_guards.py', _escalation],
    'compression.channels':     [*_pruning,
                                 _sees('head or taylor or criteri or twice or stream or refuses or sees')],
    'compression.importance':   [*_pruning, _sees('taylor or criteri')],
    'compression.plan':         [*_pruning, _sees('floor or plans')],
    'compression.cuts':         [*_pruning, _sees('state_is_cut or head or refuses')],
    'compression.pruning':      [*_pruning, _sees('floor or state_is_cut or head or refuses or sees')],
    'compression.sensitivity':  _pruning,
    'compression.quantizers':   [*_quantization, _sees('formula or calibrat')],
    'compression.quantization': [*_quantization, _sees('formula or keeps_its_state or calibrat')],
    'compression.gradual':      ['tests/test_gradual.py'],
    'evaluation.cases':         ['tests/test_guards.py'],
    'evaluation.guards':        ['tests/test_guards.py'],
    'evaluation.escalation':    [_state, _escalation],
    'evaluation.report':        ['tests/test_report.py'],
    'evaluation.state':         [_state],
    'evaluation.robustness':    ['tests/test_report.py', _state, 'tests/test_evaluation.py'],
    'evaluation.metric':        ['tests/test_evaluation.py'],
    'deployment.description':   ['tests/test_checkpoint.py'],
    'deployment.card':          ['tests/test_checkpoint.py'],
    'deployment.checkpoint':    ['tests/test_checkpoint.py'],
    'deployment.integer':       _deployment,
    'deployment.onnx':          _deployment,
    'deployment.lowered':       _deployment,
    'deployment.hub':           ['tests/test_hub.py'],
    'training.acceleration':    _training,
    'training.objectives':      ['tests/test_objectives.py'],
    'training.adversarial':     [*_training, 'tests/test_composition.py'],
    'training.free':            _training,
    'training.nuclear':         ['tests/test_one_step_training.py'],
    'training.prior':           ['tests/test_one_step_training.py'],
    'training.selection':       [*_training, 'tests/test_integration.py'],
    'training.averaging':       _training,
    'training.perturbation':    _training,
    'training.warmup':          _training,
    'training.recipes':         _training,
    'study.names':              _study,
    'study.protocol':           _study,
    'study.inputs':             _study,
    'study.rows':               _study,
    'study.cells':              _study,
    'study.claims':             ['tests/test_claims.py'],
    'study.folder':             _study,
    'study.jobs':               ['tests/test_claims.py', 'tests/test_engines.py'],
    'study.processes':          ['tests/test_engines.py'],
    'study.cluster':            ['tests/test_engines.py'],
    'study.engines':            ['tests/test_engines.py'],
    'study.status':             ['tests/test_engines.py'],
    'study.study':              _study,
    'study.presets':            _study,
    'study.definitions':        _study,
    'study.tables':             _study + _page,
    'study.tradeoff':           ['tests/test_page.py'],
    'study.words':              _page,
    'study.charts':             _page,
    'study.markup':             _page,
    'study.page':               _study + _page,
    'study.comparison':         _page,
    'study.options':            ['tests/test_engines.py', 'tests/test_cli.py'],
    'bench.data':               [],
    'bench.evaluation':         [],
    'bench.inference':          [],
    'bench.limit':              [],
    'bench.training':           [],
    'bench.profile':            [],
    'bench.kept':               [_study[0]+' -k another'],
    'bench.recipes':            [],
    'bench.speedrun':           [],
    'bench.adaptive':           [],
    'bench.engines':            ['tests/test_engines.py'],
    'bench.menu':               ['tests/test_cli.py'],
    'commands.command':         ['tests/test_cli.py'],
    'commands.studies':         ['tests/test_cli.py', 'tests/test_study.py'],
    'commands.networks':        ['tests/test_cli.py', 'tests/test_integration.py'],
    'commands.sharing':         ['tests/test_hub.py'],
    'commands.benches':         ['tests/test_cli.py'],
    'cli':                      ['tests/test_study.py', 'tests/test_integration.py']}

def path_of(module): return Path('adverfine', *module.split('.')).with_suffix('.py')

preload = 'fastai.vision.all torchattacks torch_pruning torchvision safetensors.torch nbdev.test pytest pandas'.split()
# functions that only make text or pictures
prose = set('show plot _repr_html_ to_html __str__ __repr__ extra_repr name _card _measured _size'.split())

# --- faults

binary = {ast.Add: '-', ast.Sub: '+', ast.Mult: '/', ast.Div: '*', ast.FloorDiv: '*', ast.Pow: '*', ast.Mod: '*',
    ast.BitAnd: '|', ast.BitOr: '&', ast.BitXor: '&'}
compare = {ast.Lt: ['<=', '>='], ast.LtE: ['<', '>'], ast.Gt: ['>=', '<='], ast.GtE: ['>', '<'], ast.Eq: ['!='],
    ast.NotEq: ['=='], ast.Is: ['is not'], ast.IsNot: ['is'], ast.In: ['not in'], ast.NotIn: ['in']}
_pairs = ('min max, minimum maximum, amin amax, argmin argmax, clamp_min clamp_max, clamp_min_ clamp_max_, all any, '
          'floor ceil')
swapped = {a: b for pair in _pairs.split(', ') for a,b in (pair.split(), pair.split()[::-1])}
dropped = set('abs abs_ sign sqrt square exp round round_ softmax clamp clamp_ clamp_min clamp_max reversed sorted '
              'flatten sort unique'.split())

@dataclass(frozen=True)
class Mutant:
    module:str
    cell:str      # Id of the notebook's cell
    line:int      # In the module
    start:int     # Offsets into the exported text of the cell
    end:int
    old:str
    new:str
    before:str    # The changed line, or lines
    after:str

    @property
    def key(self): return hashlib.sha1(repr(self).encode()).hexdigest()[:12]

def exported(module):
    "Notebook, id, first line and text of each cell that `module` was made from"
    path = root/path_of(module)
    text = path.read_text(encoding='utf-8')
    marks = list(re.finditer(r'^# %% (\S+\.ipynb) #(\w+)\n', text, re.M))
    for m,after in zip(marks, [*marks[1:], None]):
        code = text[m.end():after.start() if after else len(text)]
        yield (path.parent/m[1]).resolve().relative_to(root),m[2],text.count('\n', 0, m.end())+1,code.rstrip('\n')

def stages_of(module, pages=True):
    "What to run for `module`: its page, and its tests"
    page = next(exported(module))[0].as_posix()
    return [page]*pages + belongs[module]

def _faults(node, source):
    "Each fault of one node, as (start, end, new text)"
    def between(a, b, new, pattern):     # an operator between two operands
        i,j = a[1],b[0]
        m = re.search(pattern, source[i:j])
        return i+m.start(),i+m.end(),new
    at = lambda n: source.span(n)
    text = lambda n: source[slice(*at(n))]
    if isinstance(node, ast.Constant):
        v = node.value
        if isinstance(v, bool): yield *at(node),str(not v)
        elif isinstance(v, int): yield *at(node),str(v+1)
        elif isinstance(v, float): yield *at(node),('1.' if v==0 else '0.' if abs(v)<1e-6 else f'{v*.8:.6g}')
    elif isinstance(node, (ast.BinOp, ast.AugAssign)):
        a,b = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
        if type(node.op) in binary: yield between(at(a), at(b), binary[type(node.op)], r'\*\*|//|[-+*/%&|^]')
    elif isinstance(node, ast.Compare):
        for op,a,b in zip(node.ops, [node.left, *node.comparators], node.comparators):
            for new in compare[type(op)]: yield between(at(a), at(b), new, r'not\s+in|is\s+not|in|is|[<>=!]=|[<>]')
    elif isinstance(node, ast.BoolOp):
        new = 'or' if isinstance(node.op, ast.And) else 'and'
        for a,b in zip(node.values, node.values[1:]): yield between(at(a), at(b), new, r'\band\b|\bor\b')
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd): yield *at(node),f'({text(node.operand)})'
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        if not isinstance(node, ast.While):
            for new in ('True', 'False'): yield *at(node.test),new
    elif isinstance(node, ast.comprehension):
        for o in node.ifs: yield *at(o),'True'
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call): yield *at(node),'None'
    elif isinstance(node, ast.Call):
        f = node.func
        name = getattr(f, 'attr', getattr(f, 'id', ''))
        if name in swapped: yield at(f)[1]-len(name),at(f)[1],swapped[name]
        if name in dropped and isinstance(f, ast.Attribute) and getattr(f.value, 'id', '') not in ('torch', 'F',
                'math'):
            yield *at(node),f'({text(f.value)})'
        elif name in dropped and node.args: yield *at(node),f'({text(node.args[0])})'

class _Source(str):
    "Code whose nodes know where they stand, in characters"
    def span(self, node):
        lines = self.splitlines(keepends=True)
        place = lambda line, column: sum(map(len, lines[:line-1])) + len(lines[line-1].encode()[:column].decode())
        return place(node.lineno, node.col_offset),place(node.end_lineno, node.end_col_offset)

def _judged(node):
    "`node` and what is below it; without errors, annotations, imports, text, and shapes, where a fault is an error"
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)): return
    if isinstance(node, ast.FunctionDef) and node.name in prose: return
    if isinstance(node, ast.IfExp) and all(isinstance(o, ast.JoinedStr) or isinstance(o, ast.Constant)
            and isinstance(o.value, str) for o in (node.body, node.orelse)):
        return
    if isinstance(node, ast.keyword) and node.arg in ('frozen', 'kw_only', 'repr', 'verbose'): return
    yield node
    shape = isinstance(node, ast.Call) and getattr(node.func, 'attr', '') in ('view', 'reshape')
    for field,value in ast.iter_fields(node):
        if field in ('annotation', 'returns') or shape and field=='args': continue
        for o in value if isinstance(value, list) else [value]:
            if isinstance(o, ast.AST): yield from _judged(o)

def candidates(module):
    "Every fault that can be put into `module`"
    for nb,cell,line,code in exported(module):
        source = _Source(code)
        for node in _judged(ast.parse(code)):
            for start,end,new in _faults(node, source):
                first,last = code.rfind('\n', 0, start)+1,code.find('\n', end)
                last = len(code) if last<0 else last
                yield Mutant(module, cell, line+code.count('\n', 0, start), start, end, code[start:end], new,
                             code[first:last].strip(), (code[first:start]+new+code[end:last]).strip())

def draw(module, n, seed):
    "`n` faults, always the same for one text of the module and one `seed`"
    found = sorted(set(candidates(module)), key=lambda m: (m.line, m.start, m.end, m.new))
    return sorted(random.Random(f'{module} {seed}').sample(found, min(n, len(found))), key=lambda m: (m.line, m.start))

# --- runs

def _copy(to):
    "A tree to spoil: what the tests need of the project"
    for name in ('adverfine', 'nbs', 'tests', 'tools'):
        shutil.copytree(root/name, to/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for f in root.iterdir():
        if f.is_file() and f.suffix in ('.toml', '.ini', '.py', '.md', '.yml'): shutil.copy(f, to)

def _spoil(tree, mutant):
    "Put the fault into module and notebook; what undoes it"
    nb,_,_,code = next(o for o in exported(mutant.module) if o[1]==mutant.cell)
    bad = code[:mutant.start] + mutant.new + code[mutant.end:]
    files = {f: (tree/f).read_text(encoding='utf-8') for f in (path_of(mutant.module), nb)}
    module,page = files
    head = f'#{mutant.cell}\n'
    assert files[module].count(head+code)==1
    (tree/module).write_text(files[module].replace(head+code, head+bad), encoding='utf-8')
    d = json.loads(files[page])
    cell = next(c for c in d['cells'] if c['id']==mutant.cell)
    source = ''.join(cell['source'])
    assert source.count(code.strip('\n'))==1, f'{page}, cell {mutant.cell}: run nbdev-export'
    cell['source'] = source.replace(code.strip('\n'), bad.strip('\n')).splitlines(keepends=True)
    (tree/page).write_text(json.dumps(d, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')
    def undo():
        for f,text in files.items(): (tree/f).write_text(text, encoding='utf-8')
    return undo

class _Watch:
    "Plugin of pytest: the quickest tests of a file first, those behind a fixture of the file last; says what failed"
    def __init__(self, took): self.took,self.spent,self.failed = took,Counter(),''
    def pytest_collection_modifyitems(self, items):
        shared = lambda i: any(d[-1].scope=='module' for d in i._fixtureinfo.name2fixturedefs.values())
        items.sort(key=lambda i: (shared(i), self.took.get(i.nodeid, 0)))
    def pytest_runtest_logreport(self, report):
        self.spent[report.nodeid] += report.duration if report.when=='call' else 0
        if report.failed: self.failed = self.failed or report.nodeid
    def pytest_collectreport(self, report):
        if report.failed: self.failed = self.failed or f'{report.nodeid} (collection)'

def _child(tree, what, took, result):
    "Run one page or one selection of tests in this process, which is a fork of its own"
    os.setsid()
    sys.dont_write_bytecode = True
    fd = os.open(result.with_suffix('.log'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1); os.dup2(fd, 2)
    os.environ['PYTHONPATH'] = str(tree)
    sys.path[:] = [str(tree), *(o for o in sys.path if o not in ('', str(root)))]
    os.chdir(tree)
    if what.endswith('.ipynb'):
        from nbdev.config import get_config
        from nbdev.test import test_nb
        os.chdir(tree/'nbs')
        flags = get_config(tree).tst_flags
        ok,_ = test_nb(tree/what, skip_flags=flags.split() if isinstance(flags, str) else flags, basepath=tree)
        watch = _Watch({})
        if not ok: watch.failed = what
    else:
        import pytest, shlex
        watch = _Watch(took)
        code = pytest.main([*shlex.split(what), '-x', '-q', '-p', 'no:cacheprovider', '--rootdir', str(tree),
            '--basetemp', str(result.parent/'pytest')], plugins=[watch])
        if code: watch.failed = watch.failed or f'{what} (exit code {code})'
    assert 'adverfine' not in sys.modules or Path(sys.modules['adverfine'].__file__).is_relative_to(tree)
    result.write_text(json.dumps(dict(failed=watch.failed, took=watch.spent)))
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(0)

def run(tree, what, timeout, took=None):
    "What failed ('' if nothing did), seconds, and seconds of each test"
    result,start = tree.parent/f'{tree.name}.json',time.perf_counter()
    result.unlink(missing_ok=True)
    p = mp.get_context('fork').Process(target=_child, args=(tree, what, took or {}, result))
    p.start(); p.join(timeout)
    late = p.is_alive()
    if late:
        os.killpg(p.pid, signal.SIGKILL)
        p.join()
    seconds = time.perf_counter()-start
    if late: return f'{what} (out of time)',seconds,{}
    if not result.exists(): return f'{what} (exit code {p.exitcode})',seconds,{}
    d = json.loads(result.read_text())
    return d['failed'],seconds,d['took']

def _try(tree, mutant, stages, file):
    "Run what belongs to the module with this fault; the result is kept"
    undo,start,killer = _spoil(tree, mutant),time.perf_counter(),''
    try:
        for what,(seconds,took) in sorted(stages.items(), key=lambda o: o[1][0]):
            killer,_,_ = run(tree, what, 3*seconds+60, took)
            if killer: break
    finally: undo()
    file.write_text(json.dumps(dict(asdict(mutant), killed_by=killer, seconds=round(time.perf_counter()-start, 1)),
        indent=1), encoding='utf-8')
    fate = f'killed by {killer}' if killer else 'SURVIVED'
    print(f"{time.strftime('%X')} {mutant.module}:{mutant.line} {fate}: {mutant.old!r} -> {mutant.new!r}", flush=True)

def _work(tree, todo, counter, stages):
    while True:
        with counter.get_lock():
            i,counter.value = counter.value,counter.value+1
        if i>=len(todo): return
        mutant,file = todo[i]
        _try(tree, mutant, stages[mutant.module], file)

def _parallel(trees, f, *args):
    workers = [mp.get_context('fork').Process(target=f, args=(tree, *args)) for tree in trees]
    for w in workers: w.start()
    for w in workers: w.join()
    if any(w.exitcode for w in workers): sys.exit('a worker failed')

def _measure(tree, todo, counter, folder):
    "Seconds of everything in `todo`, and of each test in it, without a fault"
    while True:
        with counter.get_lock():
            i,counter.value = counter.value,counter.value+1
        if i>=len(todo): return
        failed,seconds,took = run(tree, todo[i], 900)
        if failed: sys.exit(f'{failed} fails without any fault: see {tree}.log')
        (folder/f'{i}.json').write_text(json.dumps([seconds, took]))

# --- the report

def benign(file=root/'tools/mutants.csv'):
    "(module, before, after) -> why it does not matter"
    if not file.exists(): return {}
    with file.open(encoding='utf-8', newline='') as f:
        return {(o['module'], o['original'], o['mutated']): o['reason'] for o in csv.DictReader(f)}

def report(found, out):
    "The table, and what survived without an excuse"
    excuses,rows = benign(),[]
    for m,r in found:
        why = excuses.get((m.module, m.before, m.after))
        rows.append(dict(asdict(m), killed_by=r['killed_by'], fate='killed' if r['killed_by'] else 'benign' if why
            else 'survived', reason='' if r['killed_by'] else why))
    with (out/'mutants.csv').open('w', encoding='utf-8', newline='') as f:
        w = csv.DictWriter(f, list(rows[0]))
        w.writeheader(); w.writerows(rows)
    for o in rows:
        if o['fate']=='survived':
            print(f"\n{path_of(o['module'])}:{o['line']}, cell {o['cell']}\n- {o['before']}\n+ {o['after']}")
    print(f"\n{'module':14}{'mutants':>8}{'killed':>8}{'benign':>8}{'survived':>9}{'share':>7}")
    for module in dict.fromkeys(o['module'] for o in rows):
        n = Counter(o['fate'] for o in rows if o['module']==module)
        share = n['killed']/max(n.total()-n['benign'], 1)
        print(f"{module:14}{n.total():8}{n['killed']:8}{n['benign']:8}{n['survived']:9}{share:7.0%}")

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--module', nargs='+', default=list(belongs), choices=list(belongs))
    p.add_argument('--n', type=int, default=30, help='faults in each module')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--out', type=Path, default=root/'studies/mutants')
    p.add_argument('--again', action='store_true', help='run those again that survived')
    p.add_argument('--no-pages', action='store_true', help='run the tests only, which is quicker')
    p.add_argument('--list', action='store_true', help='show the faults and run nothing')
    a = p.parse_args()
    drawn = [m for module in a.module for m in draw(module, a.n, a.seed)]
    if a.list:
        for m in drawn: print(f'{m.module}:{m.line}\n- {m.before}\n+ {m.after}')
        return
    out = a.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = lambda m: out/m.module/f'{m.key}.json'
    result = lambda m: json.loads(file(m).read_text(encoding='utf-8')) if file(m).exists() else None
    excuses = benign()
    todo = [(m, file(m)) for m in drawn if (r := result(m)) is None or a.again and not r['killed_by']
        and (m.module, m.before, m.after) not in excuses]
    if todo:
        for name in preload: __import__(name)
        work = out/f'work-{os.getpid()}'
        trees = [work/f'tree{i}' for i in range(a.workers)]
        try:
            for t in trees: _copy(t)
            for m,f in todo: f.parent.mkdir(exist_ok=True)
            stages = {module: stages_of(module, pages=not a.no_pages)
                for module in dict.fromkeys(m.module for m,_ in todo)}
            runs = list(dict.fromkeys(what for found in stages.values() for what in found))
            _parallel(trees, _measure, runs, mp.Value('i', 0), work)
            took = {what: json.loads((work/f'{i}.json').read_text()) for i,what in enumerate(runs)}
            for what,(seconds,_) in took.items(): print(f'{seconds:6.1f} s  {what}')
            _parallel(trees, _work, todo, mp.Value('i', 0), {module: {what: took[what] for what in found} for module,
                found in stages.items()})
        finally: shutil.rmtree(work, ignore_errors=True)
    report([(m, r) for m in drawn if (r := result(m))], out)

if __name__=='__main__': main()
