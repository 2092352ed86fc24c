"""Numbers in texts that come from results/: `<!--=cell digits prune-0.5 adversarial robust-->81.0 %<!--/-->`

tools/build_texts.py writes them anew; a number that somebody changes by hand is changed back, and its --check says so.
"""
import csv, re
from pathlib import Path
from statistics import mean

results = Path(__file__).resolve().parents[1]/'results'

def rows(file):
    with open(results/file, encoding='utf-8', newline='') as f: return list(csv.DictReader(f))

def column(file, name, **where): return [float(o[name]) for o in rows(file) if all(o[k]==v for k,v in where.items())]

def cell(study, label, tuning, what, parent='standard'):
    "Clean or robust accuracy of a cell of a study, the mean over its seeds"
    found = column(f'{study}/results.csv', what, label=label, fine_tuning=tuning, parent=parent)
    if not found: raise ValueError(f'results/{study}/results.csv has no cell {parent} {label} {tuning}')
    return f'{100*mean(found):.1f} %'

def seconds(study, label, tuning, parent='standard'):
    "That the training of a cell took"
    where = dict(label=label, fine_tuning=tuning, parent=parent)
    return f"{mean(column(f'{study}/results.csv', 'training_seconds', **where)):.0f}"

def share(study, label, what):
    "MACs or bytes of a network, of those without compression"
    file = f'{study}/results.csv'
    return f"{100*column(file, what, label=label)[0]/column(file, what, label='none-0')[0]:.0f} %"

def training(who, what): return f"{column('training-cnn8.csv', what, who=who.replace('_', ' '))[0]:.1f}"
def limit(who): return f"{100*column('training-cnn8.csv', 'of_limit', who=who.replace('_', ' '))[0]:.0f} %"

def adaptive(what):
    "The adaptive AutoAttack beside the standard one: how many times fewer passes, and how much higher at most"
    file = 'adaptive_autoattack.csv'
    if what=='networks': return str(len(rows(file)))
    if what=='above':
        pairs = zip(column(file, 'robust_adaptive'), column(file, 'robust_standard'))
        return f'{100*max(a-s for a,s in pairs):.1f}'
    times = [1/o for o in column(file, 'ratio')]
    return f'{min(times):.0f} to {max(times):.0f}'

def engine(name, workers, cells):
    "What a cell without work costs a study"
    found = column('engines.csv', 'ms_a_cell', engine=name, workers=workers, cells=cells)
    return f'{found[0]:.1f} ms'

known = {f.__name__: f for f in (cell, seconds, share, training, limit, adaptive, engine)}
marked = re.compile(r'<!--=(\w+)((?: [^ >]+)*)-->(.*?)<!--/-->', re.S)

def with_numbers(text):
    "`text` with what its marks ask for"
    def number(m): return f'<!--={m[1]}{m[2]}-->{known[m[1]](*m[2].split())}<!--/-->'
    return marked.sub(number, text)
