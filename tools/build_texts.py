"""Texts that are made from others: README.md from nbs/index.ipynb, the sidebar and llms.txt from nbs/wings.toml, and
numbers in pages (see measured.py) and their picture from results/.

    python tools/build_texts.py            # writes them
    python tools/build_texts.py --check    # exits 1 if one would change
"""
import json, re, sys, tomllib
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path.append(str(root/'tools'))   # with PYTHONSAFEPATH, a script's folder is not on the path
from measured import marked, with_numbers   # noqa: E402

nbs = root/'nbs'
wings = tomllib.loads((nbs/'wings.toml').read_text(encoding='utf-8'))

def read(path): return path.read_text(encoding='utf-8')

site = re.search(r'doc_url = (\S+)', read(root/'settings.ini'))[1]

def pages(wing):
    "Module and notebook of each room of `wing`: (attacks.apgd, attacks/07_apgd.ipynb)"
    rooms = wings[wing]['rooms']
    if rooms!=[wing]: return [(f'{wing}.{o}', f'{wing}/{i:02d}_{o}.ipynb') for i,o in enumerate(rooms)]
    alone = [k for k,w in wings.items() if w['rooms']==[k]]
    return [(wing, f'{alone.index(wing):02d}_{wing}.ipynb')]

# --- README.md

def cell_text(cell):
    "Markdown of a cell: prose, visible code and what it printed"
    source = ''.join(cell['source'])
    if cell['cell_type']=='markdown': return [source]
    if re.match(r'#\|\s*hide', source): return []
    texts = [''.join(o['text']) for o in cell['outputs'] if o.get('name')=='stdout']
    shown = [o['data'] for o in cell['outputs'] if o['output_type']=='execute_result']
    texts += [''.join(o['text/plain']) for o in shown if 'text/plain' in o and 'image/png' not in o]
    return [f'```python\n{source}\n```', *('\n'.join(f'    {l}' for l in t.rstrip().splitlines()) for t in texts)]

def site_link(m):
    "Pages lead to the site and pictures to the repository, so that the text reads well wherever it stands"
    if not m[1].endswith('.ipynb'): return f'](https://raw.githubusercontent.com/adverfine/adverfine/main/nbs/{m[1]})'
    return f"]({site}{re.sub('[0-9]+_(?=[^/]+$)', '', m[1]).replace('.ipynb', '.html')})"

def readme():
    "The index as Markdown, with absolute links"
    cells = json.loads(marked.sub(r'\3', with_numbers(read(nbs/'index.ipynb'))))['cells']
    text = '\n\n'.join(o for c in cells for o in cell_text(c)) + '\n'
    text = re.sub(r'\]\((?!https?:|#)([^)]+)\)', site_link, text)
    return '<!-- Made from nbs/index.ipynb by tools/build_texts.py: edit there -->\n\n' + text

# --- sidebar

def section(wing):
    links = ''.join(f'          - {page}\n' for _,page in pages(wing))
    return f"      - section: {wings[wing]['title']}\n        contents:\n{links}"

def quarto_yml():
    "_quarto.yml with the sections of the table behind the one of the tutorials"
    start,end = '      # --- from wings.toml\n','      # --- end\n'
    old = read(root/'_quarto.yml')
    head,tail = old[:old.index(start)+len(start)],old[old.index(end):]
    return head + ''.join(map(section, wings)) + tail

# --- pictures: a page can only show what lies beside it

pictures = {nbs/'images/fashion_mnist.png': root/'results/fashion_mnist/tradeoff.png'}

# --- llms.txt

def summary(notebook):
    "The line under the title of a page"
    return re.search(r'^> (.*)', ''.join(json.loads(read(nbs/notebook))['cells'][0]['source']), re.M)[1]

def llms_txt():
    "The index in short, and a line for each module"
    cells = [''.join(c['source']) for c in json.loads(read(nbs/'index.ipynb'))['cells']]
    what = re.search(r'^> (.*)', cells[0], re.M)[1]
    example = '\n'.join(next(c for c in cells if o in c) for o in ('from adverfine.all import *', 'learn.robustness('))
    parts = [f'# adverfine\n\n> {what}',
        'Everyday names come with `from adverfine.all import *`, everything else is imported from its module. Images '
        'are pixels in [0,1], `eps` is in pixels, an attack is called as `attack(model, x, y)`, and robust accuracy '
        'counts images that are right clean and under every attack.',
        f'```python\n{example}\n```',
        '## Tutorials\n\n' + '\n'.join(f'- [{p.stem}]({site}tutorials/{p.stem}.html): {summary(p.relative_to(nbs))}'
            for p in sorted((nbs/'tutorials').glob('*.ipynb')))]
    for wing,o in wings.items():
        lines = [f"- [adverfine.{module}]({site}{re.sub(r'[0-9]+_(?=[^/]+$)', '', page).replace('.ipynb', '.html')}): "
                 f'{summary(page)}' for module,page in pages(wing)]
        parts.append(f"## {o['title']}: {o['holds']}\n\n" + '\n'.join(lines))
    return '\n\n'.join(parts) + '\n'

if __name__ == '__main__':
    made = {root/'_quarto.yml': quarto_yml(), root/'README.md': readme(), root/'llms.txt': llms_txt()}
    made[nbs/'_quarto.yml'] = made[root/'_quarto.yml']
    made |= {p: with_numbers(read(p)) for p in nbs.rglob('*.ipynb')
             if not any(o[0] in '._' for o in p.relative_to(nbs).parts)}
    made = {p: text.encode() for p,text in made.items()} | {p: o.read_bytes() for p,o in pictures.items()}
    changed = [p for p,content in made.items() if not p.exists() or p.read_bytes()!=content]
    if '--check' in sys.argv and changed:
        sys.exit(f"{', '.join(str(p.relative_to(root)) for p in changed)}: run python tools/build_texts.py")
    for p in changed: p.write_bytes(made[p])
