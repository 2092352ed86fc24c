"""What needs a GPU, in one go, on a machine without internet

    python tools/gpu.py --fashion-mnist FOLDER --cifar10 FOLDER --out results/gpu
    python tools/gpu.py ... --only tests training           # some of the steps
    python tools/gpu.py ... --list                          # say what would run, and run nothing

adverfine and its extras `test` and `bench` are installed, and the data sets are on the disk. A step that fails does
not stop the others; what it said is in OUT/STEP.log. Steps that take hours go on where they were stopped. The tables
are in OUT, to be committed.
"""
import argparse, os, shlex, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
_adverfine = [sys.executable, '-c', 'import sys; from adverfine.cli import main; sys.exit(main())']

def steps(fashion, cifar, out):
    "Name -> commands, each a list of words, the quickest first"
    def bench(*words): return [*_adverfine, 'bench', *words]
    study = ['study', 'cifar10', '--preset', 'honest', '--epochs', '60', '--fine-tune-epochs', '10', '--n', '10000',
             '--eps', f'{8/255:.6f}', '--path', cifar]
    return dict(
        tests=[[sys.executable, '-m', 'pytest', '-q', '--no-notebooks', '-k', 'gpu or cuda', str(root/'tests')]],
        training=[bench('training', '--network', o, '--out', f'{out}/training') for o in ('cnn8', 'resnet18')],
        precision=[bench('precision', '--path', fashion)],
        speedrun=[bench('speedrun', '--out', f'{out}/speedrun', '--path', fashion),
                  bench('speedrun', '--data', 'cifar10', '--out', f'{out}/speedrun_cifar', '--cifar10', cifar)],
        cifar10=[[*_adverfine, *study, '--out', f'{out}/cifar10']])

def run(commands, log):
    "Run them in turn, with their words in `log`; the exit status of the first that failed, or 0"
    with log.open('a', encoding='utf-8') as f:
        for words in commands:
            f.write(f'\n$ {shlex.join(words)}\n')
            f.flush()
            status = subprocess.run(words, stdout=f, stderr=subprocess.STDOUT, cwd=root).returncode
            if status: return status
    return 0

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--fashion-mnist', required=True, help='folder of Fashion-MNIST')
    p.add_argument('--cifar10', required=True, help='folder of CIFAR-10')
    p.add_argument('--out', type=Path, default=root/'results/gpu', help='folder for tables and logs')
    p.add_argument('--only', nargs='+', choices=list(steps('', '', '')), help='some of the steps')
    p.add_argument('--list', action='store_true', help='say what would run, and run nothing')
    a = p.parse_args()
    fashion,cifar,out = (str(Path(o).resolve()) for o in (a.fashion_mnist, a.cifar10, a.out))
    chosen = {k: v for k,v in steps(fashion, cifar, out).items() if not a.only or k in a.only}
    if a.list:
        for name,commands in chosen.items():
            for words in commands: print(f'{name}: {shlex.join(words)}')
        return
    import torch
    if not torch.cuda.is_available(): sys.exit('torch finds no GPU here: torch.cuda.is_available() is False')
    Path(out).mkdir(parents=True, exist_ok=True)
    os.environ['PYTHONPATH'] = os.pathsep.join([str(root), *filter(None, [os.environ.get('PYTHONPATH')])])
    failed = []
    for name,commands in chosen.items():
        since = time.perf_counter()
        status = run(commands, Path(out)/f'{name}.log')
        said = f'failed ({status})' if status else 'done'
        print(f'{name:10} {time.perf_counter()-since:7.0f} s  {said}', flush=True)
        failed += [name]*bool(status)
    if failed: sys.exit(f"failed: {', '.join(failed)}; see {out}")

if __name__=='__main__': main()
