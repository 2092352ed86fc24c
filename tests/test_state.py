"Evaluations that go on after an interruption, and what is refused before one begins"
import copy
import pytest, torch
from torch import nn
from adverfine.threat import ThreatModel
from adverfine.attacks.triage import Triage
from adverfine.attacks.gradient import FGSM, PGD
from adverfine.attacks.square import Square
from adverfine.attacks.scoring import Scorer
from adverfine.evaluation.escalation import check_budget
from adverfine.evaluation.robustness import check_alone, evaluate

class Then(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

calls,last_call = [],[10**9]

class Impatient(nn.Module):
    "Interrupted once it has been called so often, its copies included"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x):
        calls.append(len(x))
        if len(calls)==last_call[0]: raise KeyboardInterrupt
        return self.net(x)

@pytest.fixture
def toy(monkeypatch):
    "A network in which most images fall, some of them to guards and to the escalation alone"
    monkeypatch.setenv('ADVERFINE_FASTEST', 'as it is')
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 4)).eval(),torch.rand(40, 1, 4, 4)
    net[1].weight.data *= 3
    net = nn.Sequential(Then(lambda x: (x*6).round()/6), net)
    with torch.no_grad(): y = net(x).argmax(1)
    y[3] = (y[3]+1)%4
    return Impatient(net),x,y

def _evaluate(toy, *, stop=10**9, attacks=(FGSM(.1), PGD(.1, steps=2)), bs=9, **kw):
    calls.clear()
    last_call[:] = [stop]
    return evaluate(*toy, attacks, bs=bs, progress=False, **kw)

def _facts(report):
    "Everything but the time that it took"
    examples = [(x_adv.tolist(), *rest) for _,x_adv,*rest in report.examples]
    return (report.outcomes, report.robust_after, report.passes, report.findings, report.verdict, report.meaning,
            report.curve, examples)

@pytest.mark.parametrize('kw', [dict(), dict(escalate=True, budget=3000), dict(thorough=True)],
                         ids=['plain', 'escalate', 'thorough'])
def test_what_is_interrupted_again_and_again_comes_to_the_same(toy, tmp_path, kw):
    whole = _evaluate(toy, **kw)
    n = len(calls)
    if kw.get('escalate'): assert 'AutoAttack-adaptive' in whole.passes
    for share in (.05, .3, .8):
        with pytest.raises(KeyboardInterrupt): _evaluate(toy, stop=max(round(n*share/4), 25), state=tmp_path/'a', **kw)
    assert _facts(_evaluate(toy, state=tmp_path/'a', **kw))==_facts(whole)
    again = _evaluate(toy, state=tmp_path/'a', **kw)      # all is known but what guards only look at
    looks = len(calls)
    assert _facts(again)==_facts(whole) and looks<.5*n
    for share in (.15, .5, .9):                          # each time from the start; what is done is not done again
        with pytest.raises(KeyboardInterrupt): _evaluate(toy, stop=round(n*share), state=tmp_path/f'{share}', **kw)
        report = _evaluate(toy, state=tmp_path/f'{share}', **kw)
        again = 2000 if kw.get('thorough') else 0        # queries of Square, of a batch that was not finished
        assert len(calls)<=(1.15-share)*n+looks+again and _facts(report)==_facts(whole)

@pytest.mark.parametrize('what,differs', [('images', 'answers, images'), ('labels', 'images'),
    ('weights', 'answers, weights'), ('attacks', 'attacks'), ('seed', 'seed'), ('escalate', 'escalate'),
    ('thorough', 'thorough'), ('bs', 'bs')])
def test_a_folder_of_another_evaluation_is_refused(toy, tmp_path, what, differs):
    _evaluate(toy, state=tmp_path)
    before = (tmp_path/'state.safetensors').read_bytes()
    net,x,y = copy.deepcopy(toy[0]),toy[1].clone(),toy[2].clone()
    kw = dict(attacks=dict(attacks=(FGSM(.1), PGD(.1, steps=3))), seed=dict(seed=1), escalate=dict(escalate=True),
              thorough=dict(thorough=True), bs=dict(bs=8)).get(what, {})
    if what=='images': x[0,0,0,0] /= 2
    if what=='labels': y[0] = (y[0]+1)%4
    if what=='weights': net.net[1][1].bias.data[0] += 1e-3
    with pytest.raises(ValueError, match=f'holds another evaluation .{differs} differ.: name another folder'):
        _evaluate((net, x, y), state=tmp_path, **kw)
    assert (tmp_path/'state.safetensors').read_bytes()==before

def test_functions_are_told_apart_by_what_they_say(toy, tmp_path):
    "They have no weights to look at, as an ONNX file has none"
    net,x,y = toy
    _evaluate((lambda x: net(x).detach(), x, y), attacks=Square(.1, queries=3), state=tmp_path)
    with pytest.raises(ValueError, match='holds another evaluation .answers differ.'):
        _evaluate((lambda x: net(x).detach().flip(1), x, y), attacks=Square(.1, queries=3), state=tmp_path)

def test_a_damaged_state_and_a_file_for_a_folder(toy, tmp_path):
    _evaluate(toy, state=tmp_path/'a'/'b')
    file = tmp_path/'a'/'b'/'state.safetensors'
    whole = file.read_bytes()
    for broken in (whole[:50], b'', whole[:8]+b'x'+whole[9:]):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match='is damaged .*delete it, and the evaluation begins anew'):
            _evaluate(toy, state=tmp_path/'a'/'b')
    with pytest.raises(ValueError, match='is a file: name a folder'): _evaluate(toy, state=file)
    file.unlink()
    assert _facts(_evaluate(toy, state=tmp_path/'a'/'b'))==_facts(_evaluate(toy))

# ---- what is refused before it begins

of_triage = Triage(1).passes

@pytest.mark.parametrize('norm,passes', [('linf', of_triage), ('l2', of_triage), ('l1', 200), ('l0', 200)])
def test_a_budget_that_pays_for_nothing(toy, norm, passes):
    check_budget(passes, ThreatModel(1, norm))
    with pytest.raises(ValueError, match=f'budget={passes-1} passes.*which may take {passes}: give more, or esc'):
        _evaluate(toy, attacks=FGSM(1, norm=norm), escalate=True, budget=passes-1)
    _evaluate(toy, attacks=FGSM(0, norm=norm), budget=1)         # of no account where nothing escalates

def test_networks_whose_answer_depends_on_the_batch():
    torch.manual_seed(0)
    x = torch.rand(8, 1, 6, 6)
    norm = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)).train()
    check_alone(Then(norm.eval()), x)
    with pytest.raises(ValueError, match='depends on the others in its batch.*call .eval.. on the network inside'):
        norm.train()
        evaluate(lambda x: norm(x), x, torch.zeros(8, dtype=torch.long), FGSM(.1), progress=False)
    evaluate(norm, x, torch.zeros(8, dtype=torch.long), FGSM(.1), progress=False)    # a module is put into eval mode
    check_alone(lambda x: norm.eval()(x+.3*torch.randn_like(x)), x)                  # random: something else
    check_alone(lambda x: norm(x)+1e-7*len(x), x)

def test_networks_that_round_another_way_in_a_batch():
    "Few bits turn a last digit into a step: then some images change, and much, and it is no BatchNorm's doing"
    x = torch.rand(8, 1, 4, 4)
    def says(images, changed):
        step = torch.arange(len(images))[:,None]<changed
        return images.flatten(1)[:,:3] + step*(len(images)>1)
    check_alone(lambda o: says(o, 3), x)
    with pytest.raises(ValueError, match='depends on the others in its batch'): check_alone(lambda o: says(o, 5), x)

def test_a_judge_that_knows_what_another_knew(toy):
    "Runs that are asked for again are not run again, one after another; empty records have no images"
    net,x,y = toy
    net.net = net.net[1]                 # without the rounding
    last_call[:] = [10**9]
    judge = Scorer(net, x, y)
    known,images = judge.record()
    assert images.shape==(0, *x.shape[1:]) and not known['runs']
    for k,attack in enumerate((FGSM(.02), FGSM(.06), PGD(.3))): judge.run(str(k), attack)
    runs = judge.runs
    assert len({o.robust for o in runs})==3
    again = Scorer(net, x, y)
    again.restore(*judge.record())
    assert again.remaining==judge.clean.sum() and again.passes==0
    for k,run in enumerate(runs):
        calls.clear()
        assert again.run(str(k), FGSM(.3)) is again.runs[k] and again.runs[k]==run and not calls
        assert again.remaining==round(run.robust*len(x)) and again.passes==sum(o.passes for o in runs[:k+1])
    assert again.stands.tolist()==judge.stands.tolist() and again.clean.tolist()==judge.clean.tolist()
    again.run('more', FGSM(.3))
    assert all(o.tried<=judge.stands.sum() for o in again.runs[3:]) and again.runs[3].name=='more'
