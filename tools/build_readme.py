"""Write README.md from nbs/index.ipynb, as `nbdev-readme` does where quarto is installed; `--check` exits 1 if it would change."""
import json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def readme(nb):
    "Markdown of a notebook: prose, visible code and what it printed; paths are taken relative to the top"
    parts = []
    for c in nb['cells']:
        source = ''.join(c['source'])
        if c['cell_type']=='markdown': parts.append(source)
        elif not re.match(r'#\|\s*hide', source):
            parts.append(f'```python\n{source}\n```')
            texts = [''.join(o['text']) for o in c['outputs'] if o.get('name')=='stdout']
            texts += [''.join(o['data']['text/plain']) for o in c['outputs'] if 'text/plain' in o.get('data', {}) and 'image/png' not in o['data']]
            parts += ['\n'.join(f'    {l}' for l in t.rstrip().splitlines()) for t in texts]
    text = '\n\n'.join(parts) + '\n'
    text = re.sub(r'\]\((?!https?:|#)([^)]+)\)', r'](nbs/\1)', text)
    return '<!-- Made from nbs/index.ipynb by tools/build_readme.py: edit there -->\n\n' + text

if __name__ == '__main__':
    new,file = readme(json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))),root/'README.md'
    if '--check' in sys.argv: sys.exit(file.read_text(encoding='utf-8')!=new and 'README.md is not what tools/build_readme.py makes of nbs/index.ipynb')
    file.write_text(new, encoding='utf-8')
