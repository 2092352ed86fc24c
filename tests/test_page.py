"The page of a study and of a comparison: what they say, that nothing in them runs, and how they work in a browser"
import json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from adverfine.evaluation.report import interval
from adverfine.study.comparison import compare, write_comparison
from adverfine.study.folder import read_study
from adverfine.study.page import in_words, write_report
from adverfine.study.presets import recommended
from adverfine.study.tables import accuracy_table, plot_study
from adverfine.study.tradeoff import plot_tradeoff
from fabricated import evil, fabricate, until, Words

root = Path(__file__).resolve().parents[1]
@pytest.fixture(scope='module')
def folder(tmp_path_factory): return fabricate(tmp_path_factory.mktemp('study'))

@pytest.fixture(scope='module')
def page(folder): return write_report(folder)['report.html']

@pytest.fixture
def opened(browser):
    "Open a page; it hears of all that goes wrong in it"
    contexts = []
    def _open(path, width=1400, scheme='light', scripts=True):
        shown = dict(viewport=dict(width=width, height=900), color_scheme=scheme)
        contexts.append(browser.new_context(**shown, java_script_enabled=scripts))
        tab = contexts[-1].new_page()
        tab.said,tab.asked = [],[]
        tab.on('console', lambda o: tab.said.append(o.text))
        tab.on('pageerror', lambda o: tab.said.append(str(o)))
        tab.on('dialog', lambda o: (tab.said.append('dialog'), o.dismiss()))
        tab.on('request', lambda o: tab.asked.append(o.url))
        tab.goto(Path(path).as_uri())
        if scripts and 'id=charts' in Path(path).read_text(): tab.wait_for_selector('html[data-drawn]', timeout=60_000)
        return tab
    yield _open
    for o in contexts: o.close()

def rgb(tab, what): return tab.evaluate(f"getComputedStyle(document.body)['{what}']")

@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1400])
def test_a_page_fits_and_asks_for_nothing(opened, page, width, scheme):
    tab = opened(page, width, scheme)
    assert tab.said==[] and tab.asked==[page.as_uri()]
    assert tab.evaluate('document.documentElement.scrollWidth')<=width
    boxes = tab.evaluate("[...document.querySelectorAll('.chart .main-svg')].map(o => o.getBoundingClientRect().right)")
    assert len(boxes)>=7 and max(boxes)<=width
    assert rgb(tab, 'backgroundColor')==dict(light='rgb(255, 255, 255)', dark='rgb(20, 23, 31)')[scheme]
    ink = tab.evaluate("getComputedStyle(document.querySelector('.chart .xtick text')).fill")
    assert ink==rgb(tab, 'color')
    tab.emulate_media(color_scheme=dict(light='dark', dark='light')[scheme])
    until(tab, f"getComputedStyle(document.querySelector('.chart .xtick text')).fill!='{ink}'")

def test_headings_and_names(opened, page):
    tab = opened(page)
    heads = "[...document.querySelectorAll('h1,h2,h3,h4')].filter(o => o.checkVisibility()).map(o => +o.tagName[1])"
    levels = tab.evaluate(heads)
    assert levels[0]==1 and levels.count(1)==1 and all(b-a<=1 for a,b in zip(levels, levels[1:]))
    assert tab.evaluate('document.documentElement.lang')=='en' and tab.title()=='adverfine: digits'
    unnamed = "[...document.querySelectorAll('input,select')].filter(o => !o.labels.length).length"
    assert tab.evaluate(unnamed)==0
    boxes = "[...document.querySelectorAll('[role=application],[role=region]')]"
    assert tab.evaluate(f"{boxes}.length")>7
    assert tab.evaluate(f"{boxes}.filter(o => !o.ariaLabel || o.tabIndex).length")==0
    assert tab.evaluate("[...document.images].filter(o => !o.alt).length")==0

def column(tab, name):
    "What the table of all cells shows in a column, hidden rows left out"
    return tab.evaluate("""name => { const t = document.getElementById('cells')
        const k = [...t.tHead.rows[0].cells].findIndex(o => o.textContent===name)
        const rows = [...t.tBodies[0].rows].filter(o => !o.hidden)
        return rows.map(o => o.cells[k].dataset.v ?? o.cells[k].textContent) }""", name)

def test_a_table_is_sorted_by_click_and_by_keyboard(opened, page):
    tab = opened(page)
    before = list(map(float, column(tab, 'robust, %')))
    button = tab.get_by_role('button', name='robust, %')
    button.click()
    assert list(map(float, column(tab, 'robust, %')))==sorted(before)!=before
    head = tab.locator('th', has=button)
    assert head.get_attribute('aria-sort')=='ascending'
    tab.keyboard.press('Tab')
    tab.keyboard.press('Shift+Tab')
    assert 'solid' in button.evaluate("o => getComputedStyle(o).outlineStyle")
    tab.keyboard.press('Enter')
    assert list(map(float, column(tab, 'robust, %')))==sorted(before, reverse=True)
    assert head.get_attribute('aria-sort')=='descending'
    tab.get_by_role('button', name='compression').press('Space')
    assert tab.locator('th[aria-sort]').count()==1
    words = column(tab, 'compression')
    assert words.index('1 bit')<words.index('8 bits')<words.index('pruned 50%')

def test_a_table_is_filtered(opened, page):
    tab = opened(page)
    n = len(column(tab, 'verdict'))
    assert n==42
    tab.get_by_label('Show rows with').fill('MASKING 1-bit')
    assert 0<len(column(tab, 'verdict'))<n and set(column(tab, 'verdict'))=={'gradient masking'}
    assert set(column(tab, 'compression'))=={'1-bit weights, 8-bit inputs'}
    assert tab.locator('.filter output').inner_text()==f"{len(column(tab, 'verdict'))} of {n} rows"
    tab.get_by_label('Show rows with').fill('')
    assert len(column(tab, 'verdict'))==n

def test_points_say_what_they_are(opened, page, folder):
    tab = opened(page)
    for name in ('standard', 'adversarial'): tab.get_by_label(f'{name} fine-tuning').uncheck()   # one above the other
    chart = tab.locator('.chart').first
    chart.scroll_into_view_if_needed()
    chart.locator('.scatterlayer .trace').first.locator('.point').first.hover(force=True)
    label = chart.locator('.hoverlayer .hovertext')
    label.wait_for()
    first = read_study(folder).df.iloc[0]
    low,high = (100*o for o in interval(first.clean, 50))
    assert f'clean {first.clean*100:.1f} [{low:.1f}, {high:.1f}] %' in label.text_content()
    tab.mouse.move(2, 2)
    chart.focus()
    tab.keyboard.press('ArrowRight')
    said = tab.locator('#said').inner_text()
    assert said.startswith('clean, not fine-tuned: standard parent, not compressed') and '1 seed: trusted' in said
    tab.keyboard.press('End')
    assert tab.locator('#said').inner_text().startswith('robust, not fine-tuned: standard parent, pruned 90%')
    assert label.text_content() and tab.said==[]

def test_curves_are_hidden_and_prices_chosen(opened, page):
    tab = opened(page)
    traces = "[...document.querySelectorAll('.chart')].map(o => o.querySelectorAll('.scatterlayer .trace').length)"
    def drawn(): return tab.evaluate(traces)
    def state():
        axis = 'o => [o.layout.xaxis.title.text, o.layout.xaxis.type, ...o.data.at(-1).x]'
        return tab.locator('#priced').evaluate(axis)
    all_of_them = drawn()
    tab.get_by_label('standard fine-tuning').uncheck()
    assert [a-b for a,b in zip(all_of_them, drawn())]==[2]*(len(all_of_them)-1)+[1]
    for name,kind in (('bytes', 'log'), ('latency of 64 images, ms', 'log'), ('seconds of its training', 'linear')):
        tab.get_by_label('Price:').select_option(name)
        until(tab, f"document.getElementById('priced').layout.xaxis.title.text=='{name}'")
        title,axis,*front = state()
        assert (title,axis)==(name,kind) and front==sorted(front) and front
    assert drawn()[-1]==all_of_them[-1]-1 and tab.said==[]          # still hidden

def test_without_scripts_there_is_the_static_page(opened, page):
    tab = opened(page, scripts=False)
    assert tab.locator('img').is_visible() and not tab.locator('.chart').first.is_visible()
    assert tab.locator('#cells').is_visible() and not tab.locator('.filter').is_visible()

def hostile(k, row):
    return dict.fromkeys(('data', 'reasons', 'parent', 'attack', 'network'), evil) | dict(
        verdict=evil if k%2 else 'trusted', fine_tuning=f'{evil}{k%3}', version=f'{evil}{k%2}',
        label=f"{row['label']}-{evil}")


@pytest.mark.parametrize('interactive', [False, True])
def test_nothing_in_a_hostile_folder_runs(opened, tmp_path, interactive):
    out = fabricate(tmp_path/'evil', hostile, levels=(.5,), bits=(), joint=(), parents=('standard',))
    said = json.loads((out/'study.json').read_text())
    said['protocol']['judge']['attacks'][0] |= dict(kind=f'a:{evil}', version=evil)
    said['protocol']['fine_tunings'][evil] = dict(how=evil)
    (out/'study.json').write_text(json.dumps(said))
    other = fabricate(tmp_path/'good', levels=(.5,), bits=(), joint=(), parents=('standard',))
    pages = [write_report(out, interactive)['report.html'],
             write_comparison(tmp_path/'both', out, other, interactive=interactive)['comparison.html']]
    for path in pages:
        tab = opened(path)
        assert tab.evaluate('window.hacked')==None and tab.said==[] and tab.asked==[path.as_uri()]  # noqa: E711
        assert tab.locator('b, [onclick], [onerror], img[src=x]').count()==0
        assert tab.locator('script').count()==(2+len(re.findall('<script type', path.read_text())))*interactive
        title = tab.evaluate("document.querySelector('h1').textContent")
        assert title.endswith(evil if path is pages[0] else 'each other')
        if not interactive: continue
        tab.locator('.chart').first.press('ArrowRight')
        assert '<b onclick' in tab.locator('.chart .hovertext').text_content()       # as a text
        assert not tab.locator('.chart a').count() and not tab.locator('.chart [style*=bold]').count()

def test_the_policy_stops_what_would_have_got_in(opened, page, tmp_path):
    path = tmp_path/'page.html'
    smuggled = '<script>window.hacked=1</script><img src="http://localhost:9/x"></main>'
    path.write_text(page.read_text().replace('</main>', smuggled))
    tab = opened(path)
    assert tab.evaluate('window.hacked')==None and len(tab.said)>=2  # noqa: E711
    assert tab.locator('.chart .main-svg').count()

def test_a_page_says_how_and_what_is_doubtful(folder):
    html = write_report(folder, interactive=False)['report.html'].read_text()
    assert '<script' not in html and not re.search('https?:', html)
    assert html.count('<img alt="')==2 and html.index('What it costs')<html.index('with its MACs, bytes')
    said,df = Words(html).text,read_study(folder).df
    assert in_words(folder) in said and '21 of 42 cells are trusted' in said and (df.verdict=='trusted').sum()==21
    section = said[said.index('What did not converge, and why'):said.index('by fine-tuning')]
    found = [int(o) for o in re.findall(r'reason (\d+)', section)]
    assert found==[k for k in range(42) if df.verdict[k]!='trusted']
    files = 'figure.png', 'figure.svg', 'tradeoff.png', 'tradeoff.svg', 'results.csv'
    assert all((folder/o).stat().st_size for o in files)

def test_the_extra_is_named_where_it_is_missing(folder, monkeypatch):
    def nothing(name): return None
    for module in ('deployment.onnx', 'study.page'): monkeypatch.setattr(f'adverfine.{module}.find_spec', nothing)
    with pytest.raises(ImportError, match=r"pip install 'adverfine\[report\]'"): write_report(folder, interactive=True)
    assert '<script' not in write_report(folder)['report.html'].read_text()

def test_hollow_means_not_trusted(folder):
    fig = plot_study(read_study(folder).df)
    assert len(fig.axes)==6 and [o.get_text() for o in fig.axes[1].get_xticklabels()]==['float', '8', '1/8', '1']
    df = read_study(folder).df
    first = df[(df.parent=='standard') & df.compression.isin(['none', 'prune'])]
    points = [(o.get_markerfacecolor(), len(o.get_xdata())) for o in fig.axes[0].lines if o.get_marker()=='o']
    assert sum(n for fill,n in points if fill=='white')==(first.verdict!='trusted').sum()>0
    assert sum(n for fill,n in points if fill!='white')==len(first)+(first.verdict=='trusted').sum()

def test_the_tradeoff_has_a_point_for_each_network(folder):
    df = read_study(folder).df
    ax,*prices = plot_tradeoff(df).axes
    points = [(x, o.get_markerfacecolor()!='white') for o in ax.lines if o.get_marker() in 'oD' for x in o.get_xdata()]
    assert sorted(points)==sorted(zip(df.robust, df.verdict=='trusted'))
    assert len(prices)==3 and all(len(o.patches)==len(ax.get_yticks())==df.label.nunique() for o in prices)

def test_fine_tunings_of_any_name_are_shown(tmp_path):
    tunings = ['none', *recommended(.1, 2, 1e-3)]
    object.__setattr__(tunings[2], 'name', 'mine')
    df = read_study(fabricate(tmp_path, fine_tunings=tunings)).df
    assert list(accuracy_table(df))[3:6]==['not fine-tuned', 'standard', 'mine']
    assert 'robust, mine fine-tuning' in [o.get_text() for o in plot_study(df).legends[0].get_texts()]

def test_a_study_beside_the_figures_of_a_paper(tmp_path):
    paths = [fabricate(tmp_path/o, robust=k*.01) for k,o in enumerate(('here', 'there'))]
    paper = tmp_path/'reference.csv'
    paper.write_text('parent,compression,level,fine_tuning,clean,robust\nstandard,prune,0.5,adversarial,.866,.811\n'
                     'standard,quantize,1,adversarial,.10,.10\nstandard,prune,0.7,adversarial,.850,.795\n')
    table = compare(*paths, paper)
    assert list(table)[3:]==['digits (here)', 'digits (there)', 'reference'] and len(table)==43
    row = table.query("compression=='pruned 50%' and `fine-tuning`=='adversarial' and parent=='standard'").iloc[0]
    same = "label=='prune-0.5' and fine_tuning=='adversarial' and parent=='standard'"
    first = read_study(paths[0]).df.query(same).iloc[0]
    assert row.reference=='86.6 / ≤81.1' and row['digits (here)'].startswith(f'{first.clean*100:.1f} [')
    assert f'{first.robust*100+1:.1f} [' in row['digits (there)']
    assert table.iloc[-1].reference=='85.0 / ≤79.5' and table.iloc[-1]['digits (here)']==''
    html = write_comparison(tmp_path/'all', *paths, paper)['comparison.html'].read_text()
    assert 'Figures from a file' in html and Words(html).text.count('It runs PGD with 20 steps')==2

def test_style_and_script_are_in_the_built_package(tmp_path):
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(root/name, tmp_path)
    shutil.copytree(root/'adverfine', tmp_path/'adverfine', ignore=shutil.ignore_patterns('__pycache__'))
    build = [sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', 'built']
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    for name in ('page.css', 'page.js'):
        assert (tmp_path/'built/adverfine/study'/name).read_bytes()==(root/'adverfine/study'/name).read_bytes()

