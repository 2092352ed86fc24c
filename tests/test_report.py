"Evaluations whose every figure can be worked out by hand"
import copy, json
from dataclasses import replace
import pytest, torch
from torch import nn
from fastai.vision.all import Learner
from adverfine.threat import pixel_space, ThreatModel
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.losses import margin
from adverfine.attacks.scoring import Asked, attacked, Scorer, score
from adverfine.attacks.gradient import FGSM, PGD
from adverfine.attacks.apgd import APGD
from adverfine.attacks.square import Square
from adverfine.attacks.autoattack import AutoAttack
from adverfine.compression.quantization import quantize
from adverfine.evaluation.cases import Finding
from adverfine.evaluation.report import interval, RobustnessReport
from adverfine.evaluation.robustness import check_alone, evaluate
import fastai.callback.progress  # noqa: F401 verbs of a Learner

def _toy(scale=1.):
    "Class 0 where the first two pixels outweigh the last two by `4 gap`, else class 1; class 2 never"
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    w = torch.tensor([1., 1, -1, -1])*scale
    net[1].weight.data,net[1].bias.data = torch.stack([w, -w, 0*w]),torch.tensor([0., 0, -100])
    return net.eval()

# one step of .05 turns a gap of less, one of .1 as well
gaps = [.02, -.03, .04, -.06, .07, -.22, .25, -.02, .12, -.3, .09, .28, .16, -.4]
toy_x = torch.stack([.5+g*torch.tensor([1., 1, -1, -1]) for g in gaps]).view(-1, 1, 2, 2)
toy_y = torch.tensor([int(g<0) for g in gaps])
# the network is wrong about these two
toy_y[6] = 1
toy_y[9] = 2
first,second = PGD(.1, steps=1, step_size=.05, random_start=False),FGSM(.1)
toy_outcomes = ['PGD-1', 'PGD-1', 'PGD-1', 'FGSM', 'FGSM', 'stands', 'wrong', 'PGD-1', 'stands', 'wrong', 'FGSM',
    'stands', 'stands', 'stands']

def test_wilson_intervals():
    for p,n in [(.5, 100), (.9, 40), (0, 10), (1, 1000), (.123, 7)]:
        z = 1.959964         # the ends are where (p-q)^2 = z^2 q(1-q)/n
        a,b,c = 1+z*z/n,-2*p-z*z/n,p*p
        root = (b*b-4*a*c)**.5
        assert interval(p, n)==pytest.approx(((-b-root)/(2*a), (-b+root)/(2*a)), abs=1e-12)
    assert interval(0, 10)[0]==0 and interval(1, 10)[1]==pytest.approx(1) and interval(1, 10)[0]<.8

@pytest.mark.parametrize('bs', [256, 3])
def test_report(bs, tmp_path):
    report = evaluate(_toy(), toy_x, toy_y, [first, second], bs=bs, vocab=('left', 'right', 'never'), progress=False)
    assert list(report.outcomes)==toy_outcomes and report.labels==tuple(toy_y.tolist()) and report.n==14
    assert (report.clean, report.robust)==(12/14, 5/14) and report.robust_after=={'PGD-1': 8/14, 'FGSM': 5/14}
    assert report.attacks==(first, second) and report.threat==ThreatModel(.1)
    assert report.clean_ci==interval(12/14, 14) and report.robust_ci==interval(5/14, 14)
    low,high = report.robust_ci
    assert low<5/14<high and f'robust {5/14:.4f} [{low:.4f}, {high:.4f}]' in str(report)
    ran = {'PGD-1', 'FGSM', 'guard scaled_margin', 'guard black_box'}       # what found nothing has no row, but a price
    assert set(report.took)==ran==set(report.passes) and all(0<o<report.seconds for o in report.took.values())
    assert report.crafted in ('as it is', 'channels_last', 'fused') and not report.bf16
    assert list(report.curve)==pytest.approx([0, .05, .1, .15, .2, .3])
    assert list(report.curve.values())==pytest.approx([12/14, 8/14, 5/14, 4/14, 3/14, 1/14])
    images = report.images()
    assert images.clean.tolist()==[o!='wrong' for o in toy_outcomes]
    assert images.robust.tolist()==[o=='stands' for o in toy_outcomes]
    assert images['PGD-1'].tolist()==[o in ('FGSM', 'stands') for o in toy_outcomes]
    assert images['FGSM'].tolist()==images.robust.tolist() and images.label.tolist()==toy_y.tolist()
    assert list(images)==['label', 'clean', 'PGD-1', 'FGSM', 'robust']
    classes = report.per_class()
    assert list(classes.index)==['left', 'right', 'never'] and classes.n.tolist()==[7, 6, 1]
    assert classes.clean.tolist()==[1, 5/6, 0] and classes.robust.tolist()==pytest.approx([3/7, 2/6, 0])
    assert len(report.examples)==7
    leads = []
    for x,x_adv,y,pred,name in report.examples:
        i = next(i for i in range(14) if torch.equal(toy_x[i], x))
        assert name==toy_outcomes[i] and y==toy_y[i]!=pred==1-y
        assert (x_adv-x).abs().max()==pytest.approx(.05 if name=='PGD-1' else .1)
        leads.append(margin(_toy()(x_adv[None]), torch.tensor([y])).item())
    assert leads==sorted(leads, reverse=True)
    d = json.loads(report.to_json(tmp_path/'report.json'))
    assert d==json.loads((tmp_path/'report.json').read_text()) and d['left']==report.robust_after
    assert d['per_class'][0]=={'class': 'left', 'n': 7, 'clean': 1, 'robust': 3/7}
    assert d['vocab']==['left', 'right', 'never'] and d['threat']==dict(eps=.1, norm='linf', clamp=True)
    assert [o['name'] for o in d['attacks']]==['PGD-1', 'FGSM'] and len(d['findings'])==len(report.findings)
    assert d['outcomes']==toy_outcomes and d['bf16'] is False and d['crafted']==report.crafted
    assert d['clean_ci']==list(report.clean_ci) and d['robust_ci']==list(report.robust_ci)
    assert d['passes']==report.passes and d['verdict']==report.verdict=='trusted' and d['meaning']==report.meaning
    assert d['broken'] is d['escalated'] is False and d['left_out']==d['remedies']==[] and d['data']==d['split']==''
    assert not list(tmp_path.glob('None*')) and isinstance(report.to_json(), str)
    nameless = evaluate(_toy(), toy_x, toy_y, first, progress=False)
    assert list(nameless.per_class().index)==['0', '1', '2'] and nameless.vocab is None

def test_guards_of_an_evaluation():
    report = evaluate(_toy(), toy_x, toy_y, [first, second], progress=False)
    assert report.verdict=='trusted' and report.reasons==()==report.remedies
    assert {o.guard for o in report.findings}=={'determinism', 'probabilities', 'gradients', 'zero_gradient',
        'unbounded', 'scaled_margin', 'black_box'}
    thorough = evaluate(_toy(), toy_x, toy_y, second, thorough=True, parent=_toy(), progress=False)
    assert {'convergence', 'plateau', 'transfer'}<={o.guard for o in thorough.findings}

def test_what_guards_find_is_deducted_and_named():
    "PGD with half the budget leaves three images that the guards' margin attack takes"
    weak = evaluate(_toy(), toy_x, toy_y, first, progress=False)
    assert weak.verdict=='not converged' and weak.meaning=='an upper bound: a stronger attack finds more'
    [found] = [o for o in weak.findings if not o.ok]
    assert found.guard=='scaled_margin' and found.value==pytest.approx(3/14) and found.limit==pytest.approx(1/14)
    assert weak.reasons==(f'scaled_margin: {found.says}',) and weak.remedies==(found.remedy,)
    assert list(weak.outcomes)==['guard scaled_margin' if o=='FGSM' else o for o in toy_outcomes]
    assert weak.robust==5/14 and weak.robust_after=={'PGD-1': 8/14, 'guard scaled_margin': 5/14}
    assert list(weak.images())==['label', 'clean', 'PGD-1', 'guard scaled_margin', 'robust']
    assert {o[4] for o in weak.examples}=={'PGD-1', 'guard scaled_margin'} and len(weak.examples)==7
    assert str(weak).endswith(f'remedy: {found.remedy}') and found.remedy.split(',')[0] in weak.to_html(picture=False)

def _report(*signs, robust=.5, **kw):
    "A report whose guards are signs of these"
    found = tuple(Finding(f'g{i}', False, 1., 0., 'it is so', 'here', o, f'remedy {o}') for i,o in enumerate(signs))
    fine = Finding('fine', True, 0., 0., 'nothing', 'here', 'masking', 'none')
    return RobustnessReport(.8, robust, 10, ThreatModel(.1), (FGSM(.1),), {'FGSM': robust}, {'FGSM': 1.},
                            {'FGSM': 20}, 1., (fine, *found), **kw)

@pytest.mark.parametrize('signs,kw,verdict,meaning', [
    ((), {}, 'trusted', 'nothing that was tried finds more'),
    (('weakness',), {}, 'not converged', 'an upper bound: a stronger attack finds more'),
    ((), dict(left_out=('Square', 'FGSM')), 'not converged',
     'an upper bound: the budget did not suffice for Square, FGSM'),
    (('weakness',), dict(left_out=('Square',)), 'not converged',
     'an upper bound: a stronger attack finds more; the budget did not suffice for Square'),
    (('masking',), {}, 'gradient masking', 'an upper bound, and may be far too high'),
    (('masking',), dict(escalated=True), 'gradient masking',
     'not broken: the figure is an upper bound, and may be far too high'),
    (('weakness', 'masking'), dict(escalated=True), 'gradient masking', 'not broken'),
    (('masking',), dict(broken=True, left_out=('Square',)), 'gradient masking',
     'broken: the figure is that of attacks which get around it')])
def test_verdicts(signs, kw, verdict, meaning):
    report = _report(*signs, **kw)
    assert report.verdict==verdict and report.meaning.startswith(meaning)
    assert report.remedies==tuple(f'remedy {o}' for o in signs) and len(report.reasons)==len(signs)
    html = report.to_html(picture=False)
    for text in (str(report), html):
        assert verdict in text and report.meaning in text
        assert all((f'remedy: remedy {o}' in text)!=report.broken for o in signs)
    assert ('#1e7a46' in html)==(verdict=='trusted')

def test_a_report_that_contradicts_itself_is_refused():
    for clean,robust in ((.8, .9), (1.2, .5), (.8, -.1)):
        with pytest.raises(ValueError, match=f'robust accuracy {robust} and clean accuracy {clean}.*right clean and'):
            replace(_report(), clean=clean, robust=robust)
    assert _report(robust=.8).robust==.8

def test_where_images_come_from_is_said():
    report = evaluate(_toy(), toy_x, toy_y, second, data='toys', split='test', progress=False)
    assert '14 images (toys, test)' in str(report) and 'toys, test' in report.to_html(picture=False)
    d = json.loads(report.to_json())
    assert (d['data'], d['split'])==('toys', 'test')

def test_only_eight_examples():
    x,y = (torch.cat([o, o]) for o in (toy_x, toy_y))
    report = evaluate(_toy(), x, y, [first, second], progress=False)
    assert len(report.examples)==8
    leads = [margin(_toy()(o[1][None]), torch.tensor([o[2]])).item() for o in report.examples]
    every = sorted((margin(_toy()(a.threat.project(a(_toy(), x[i:i+1], y[i:i+1]), x[i:i+1])), y[i:i+1]).item()
        for a in (first, second) for i in range(28) if report.outcomes[i]==a.name), reverse=True)
    assert leads==pytest.approx(every[:8], abs=1e-5)

def test_attacks_of_one_name():
    report = evaluate(_toy(), toy_x, toy_y, [first, first, second, second, second], progress=False)
    assert list(report.robust_after)==['PGD-1', "PGD-1'", 'FGSM', "FGSM'", "FGSM''"]
    assert list(report.robust_after.values())==[8/14, 8/14, 5/14, 5/14, 5/14]
    parts = evaluate(_toy(), toy_x, toy_y, AutoAttack(.1, version='fast'), progress=False)
    assert list(parts.robust_after)==['AutoAttack-fast: APGD-CE', 'AutoAttack-fast: Square'] and parts.robust==5/14

def test_order_is_by_cost():
    report = evaluate(_toy(), toy_x, toy_y, [Square(.1, queries=40), PGD(.1), FGSM(.1)], progress=False)
    assert [a.name for a in report.attacks]==['FGSM', 'PGD-10', 'Square']
    assert list(report.robust_after)==['FGSM', 'PGD-10', 'Square']
    for attacks,why in [([], 'attacks is empty'), ([FGSM(.1), 'PGD'], 'is no adverfine attack'),
            ([FGSM(.1), FGSM(.2)], 'under another threat model'),
            ([FGSM(.1), FGSM(.1, norm='l2')], 'under another threat model')]:
        with pytest.raises(ValueError, match=why): evaluate(_toy(), toy_x, toy_y, attacks)
    with pytest.raises(ValueError, match='14 images but 13 labels'): evaluate(_toy(), toy_x, toy_y[:13], FGSM(.1))
    with pytest.raises(ValueError, match='in \\[0,1\\]'): evaluate(_toy(), toy_x+1, toy_y, FGSM(.1))

def test_curve():
    curve = lambda x, y, eps, **kw: evaluate(_toy(), x, y, FGSM(eps, **kw), progress=False).curve
    assert list(curve(toy_x, toy_y, .4))==pytest.approx([0, .2, .4, .6, .8])
    assert list(curve(toy_x, toy_y, .5))==pytest.approx([0, .25, .5, .75, 1]) and list(curve(toy_x, toy_y, 0.))==[0]
    # a step of eps in l2 is one of eps/2 in each pixel
    assert list(curve(toy_x, toy_y, .1, norm='l2').values())[1:3]==pytest.approx([sum(o!='wrong' and abs(g)>e/2 for o,
        g in zip(toy_outcomes, gaps))/14 for e in (.05, .1)])
    many,labels = toy_x[5:6].expand(200, -1, -1, -1).clone(),torch.ones(200, dtype=torch.long)
    labels[:100] = 2                                  # of 128 at even distances half are wrong
    assert curve(many, labels, .1)[0.]==.5 and curve(many, labels, .1)[.1]==.5
    assert curve(toy_x[6:7], toy_y[6:7], .1)=={}      # nothing right, nothing to draw

def test_deployed_network_and_its_fake_quantized_one():
    net = _toy()
    blind = lambda x: net(x).detach()
    report = evaluate(blind, toy_x, toy_y, [first, second], fake_quantized=net, progress=False)
    assert [o.split(' ')[0] if o!='stands' else o for o in report.outcomes]==toy_outcomes
    assert list(report.robust_after)==['PGD-1', 'FGSM'] and report.curve[.1]==5/14 and not report.bf16
    assert 'agreement' in {o.guard for o in report.findings}
    square = evaluate(blind, toy_x, toy_y, Square(.1, queries=30), progress=False)
    assert square.curve=={} and any('black-box' in o for o in square.reasons)
    backwards = _toy(-1.)                              # the network is asked about, not its fake-quantized one
    report = evaluate(blind, toy_x, toy_y, second, fake_quantized=backwards, progress=False)
    assert report.clean==12/14 and report.robust_after['FGSM']==12/14

class Compiled(nn.Module):
    "What torch.compile leaves behind"
    def __init__(self, net): super().__init__(); self._orig_mod = net
    def forward(self, x): return self._orig_mod(x)

def test_bfloat16_is_for_modules_that_are_neither_quantized_nor_compiled(monkeypatch, tmp_path):
    import adverfine.networks.fastest as room
    from adverfine.networks import timings
    def as_bf16_wins(forms, x): return {name: .5 if 'bf16' in name else 1. for name in forms}
    monkeypatch.setattr(room, '_times', as_bf16_wins)
    monkeypatch.setattr(timings, '_known', {})
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(room, 'bf16_is_fast', lambda device: True)
    net,fake_quantized = _toy(),_toy()
    quantize(fake_quantized, 16, [toy_x])
    def said(m, **kw): return evaluate(m, toy_x, toy_y, FGSM(.1), progress=False, **kw)
    assert said(net).bf16 and said(net).crafted in ('bf16', 'fused bf16') and not said(net, bf16=False).bf16
    assert json.loads(said(net).to_json())['bf16'] is True
    for o in (fake_quantized, lambda x: net(x), Compiled(net)): assert not said(o).bf16
    assert said(lambda x: net(x)).crafted=='as it is'==said(Compiled(net)).crafted
    monkeypatch.setattr(room, 'bf16_is_fast', lambda device: False)
    assert not said(net).bf16 and said(net, bf16=True).bf16

def test_bfloat16_crafts_and_float32_decides(monkeypatch):
    "An evaluation that crafts in bfloat16 asks the network itself, in float32, about each image that it made"
    asked = []
    class Asking(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x):
            out = self.net(x)
            asked.append((self, x.detach().clone(), x.requires_grad, torch.is_autocast_enabled('cpu'), out.dtype))
            return out
    net = Asking(_toy())
    report = evaluate(net, toy_x, toy_y, [first, second], bf16=True, progress=False)
    assert list(report.outcomes)==toy_outcomes and report.bf16
    own = [o for o in asked if o[0] is net]
    assert not any(autocast or gradient or dtype!=torch.float32 for _,_,gradient,autocast,dtype in own[:4])
    assert all(any(torch.equal(o[None], b) for _,x,*_ in own for b in x.split(1)) for _,o,*_ in report.examples)

def test_batches():
    idxs = torch.tensor([0, 2, 3, 5, 6])
    def batches(bs, idxs=idxs, **kw):
        return [o.idxs.tolist() for o in attacked(_toy(), FGSM(.1), toy_x[:7], toy_y[:7], idxs, bs=bs, **kw)]
    assert batches(2)==[[0, 2], [3, 5], [6]] and batches(5)==[[0, 2, 3, 5, 6]]
    assert [len(o) for o in batches(4)]==[3, 2] and batches(4, idxs[:0])==[]
    assert batches(2, done=1)==[[3, 5], [6]] and batches(2, done=3)==[]
    net = _toy()
    sizes,ask = [],net.forward
    net.train()
    net.forward = lambda x: (sizes.append(len(x)), ask(x))[1]        # so it stays as it is: nothing faster crafts
    evaluate(net, toy_x, toy_y, [first, second], bs=5, progress=False)
    # clean; eight together twice and alone; 12 stand: three batches, crafted and judged
    assert sizes[:3]==[5, 5, 4] and sizes[3:13]==[8, 8]+[1]*8 and sizes[13:19]==[4]*6 and net.training

def test_a_batch_that_goes_on_has_the_randomness_that_it_would_have_had():
    idxs = torch.arange(7)
    attack = PGD(.1, steps=1, step_size=1e-3)
    def images(**kw): return [o.x_adv for o in attacked(_toy(), attack, toy_x, toy_y, idxs, bs=3, **kw)]
    whole = images(seed=1)
    assert all(torch.equal(a, b) for a,b in zip(whole[2:], images(seed=1, done=2)))
    assert not torch.equal(whole[0], images(seed=2)[0]) and not torch.equal(whole[0], whole[1])

def test_an_attack_that_leaves_its_budget_is_stopped_at_once():
    class Far(FGSM):
        def craft(self, model, x, y, generator): return x+2*self.eps
    for run in (lambda: score(_toy(), Far(.1), toy_x, toy_y), lambda: evaluate(_toy(), toy_x, toy_y, Far(.1))):
        with pytest.raises(ValueError, match='Far left its budget'): run()

class Passes(nn.Module):
    "Counts passes of single images, forward and backward"
    def __init__(self, net, forward_only=False): super().__init__(); self.net,self.n = net,0
    def forward(self, x):
        self.n += len(x)
        if x.requires_grad: x.register_hook(self.back)
        return self.net(x)
    def back(self, grad):
        self.n += len(grad)
        return grad

toy_idxs = [i for i,o in enumerate(toy_outcomes) if o!='wrong']

@pytest.mark.parametrize('attack,own', [(FGSM(.1), 2*12+12), (PGD(.3, steps=7), 7*2*12+12),
    (PGD(.3, steps=3, restarts=2), 2*3*2*12+2*12+12), (Square(0., queries=9), (9+1)*12+12), (APGD(.1, steps=6), None),
    (PGD(.3, steps=7, until_fooled=True), None)])
def test_a_forward_pass_is_one_and_a_backward_pass_another(attack, own):
    """Each attack asks the network a last time about what it made; with eps 0 nothing falls to Square before its end,
    and how long APGD climbs depends on who falls, as PGD does where it lets go of images"""
    net,ticks = Passes(_toy()),[]
    judge = Scorer(net, toy_x, toy_y, bs=5, tick=ticks.append)
    assert net.n==14                                         # clean: known before any attack
    run = judge.run('x', attack)
    assert run.passes==net.n-14==sum(ticks)==judge.passes and own in (None, run.passes) and run.tried==12
    report = evaluate(lambda x: net(x), toy_x, toy_y, attack, bs=5, progress=False)
    again = Scorer(_toy(), toy_x, toy_y, bs=5)
    let_go = again.run(attack.name, attack.letting_go())                           # its name is part of the seed
    assert report.passes[attack.name]==let_go.passes
    if isinstance(attack, PGD): assert let_go.passes<=run.passes

def test_passes_through_a_fast_and_another_network_count_too():
    for through in (None, Passes(_toy(-1.))):
        exact,fast = Passes(_toy()),Passes(_toy())
        judge = Scorer(exact, toy_x, toy_y, fast=fast)
        exact.n = 0
        run = judge.run('x', PGD(.1, steps=3), through=through)
        seen = fast if through is None else through
        assert seen.n==3*2*12 and exact.n==12 and run.passes==seen.n+exact.n
        assert through is None or fast.n==0
    # what a surrogate says that a call costs is counted
    class Dear(nn.Module):
        passes_a_call = 4,9
        def forward(self, x): return _toy()(x)
    assert Scorer(_toy(), toy_x, toy_y).run('x', PGD(.1, steps=3), through=Dear()).passes==3*9*12+12
    assert Scorer(_toy(), toy_x, toy_y).run('x', Square(0., queries=3), through=Dear()).passes==4*4*12+12
    asked = Asked(_toy(), Dear())
    asked(toy_x); asked(toy_x.clone().requires_grad_()); asked.exactly(toy_x)
    assert asked.passes==14*(4+9+1) and not asked.training

@pytest.mark.parametrize('attack', [FGSM(.1), PGD(.1, steps=5), APGD(.1, steps=5), Square(.1, queries=20),
                                    AutoAttack(.1, version='fast')], ids=lambda o: o.name)
def test_what_a_fast_network_claims_and_the_exact_one_denies_does_not_count(attack):
    "It says that everything is wrong; an attack that believed it would stop at once"
    always_wrong = nn.Sequential(_toy(), _Swapped())
    judge = score(_toy(), attack, toy_x, toy_y, fast=always_wrong)
    for i,(lead,k,x_adv,predicted) in enumerate(judge.examples):
        assert _toy()(x_adv[None]).argmax().item()==predicted!=toy_y[k]
    assert [o!='stands' and o!='wrong' for o in judge.outcomes]==judge.fell.tolist()
    assert judge.robust>=5/14                    # who withstands the exact network's attacks cannot fall

def test_an_attack_goes_on_after_a_claim_that_is_denied():
    "The fast network says class 1 of all images, its gradients are right: who falls, falls"
    zeros = [i for i,o in enumerate(toy_outcomes) if o!='wrong' and toy_y[i]==0]
    hasty = _toy()
    hasty[1].bias.data[1] = 10
    for attack in (APGD(.1, steps=10), APGD(.1, steps=10, loss='margin')):
        judge = score(_toy(), attack, toy_x[zeros], toy_y[zeros], fast=hasty)
        assert judge.stands.tolist()==[toy_outcomes[i]=='stands' for i in zeros]

class _Swapped(nn.Module):
    "Classes 0 and 1 change places"
    def forward(self, z): return z[:,[1,0,2]]

def _toy_learner():
    torch.manual_seed(0)
    learn = Learner(digits_dls(n_train=200, normalize=(.5,.25)), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    return learn

def test_robustness_of_a_learner():
    learn = _toy_learner()
    x,y = pixels(learn.dls[2])
    net = pixel_space(learn.dls).wrap(learn.model)
    whole = learn.robustness(FGSM(.1), progress=False)
    assert whole.n==len(x) and whole.labels==tuple(y.tolist())
    assert whole.outcomes==evaluate(net, x, y, FGSM(.1), progress=False).outcomes
    assert whole.vocab==tuple(learn.dls.vocab)
    some = learn.robustness(FGSM(.1), n=60, progress=False)
    i = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:60].sort().values
    assert some.labels==tuple(y[i].tolist()) and some.images().FGSM.tolist()==whole.images().FGSM[i.tolist()].tolist()
    assert learn.robustness(FGSM(.1), n=60, seed=1, progress=False).labels!=some.labels
    valid = learn.robustness(FGSM(.1), dl=learn.dls.valid, progress=False)
    assert valid.labels==tuple(pixels(learn.dls.valid)[1].tolist())
    assert learn.robustness(FGSM(.1), n=len(x), progress=False).n==len(x)
    for n in (0, len(x)+1, -1):
        with pytest.raises(ValueError, match=f'n={n}: there are'): learn.robustness(FGSM(.1), n=n)
    learn.dls.loaders = learn.dls.loaders[:2]
    assert learn.robustness(FGSM(.1), progress=False).labels==valid.labels       # no test set
    report = learn.robustness(PGD(.1, steps=1), parent=copy.deepcopy(learn.model), progress=False)
    assert 'transfer' in {o.guard for o in report.findings}
    starts = [learn.robustness(PGD(.5, steps=1, step_size=1e-4), seed=s, progress=False).outcomes for s in (0, 0, 1)]
    assert starts[0]==starts[1]!=starts[2]

def test_robustness_of_what_is_deployed():
    learn = _toy_learner()
    space = pixel_space(learn.dls)
    deployed = lambda x: learn.model(space.from_pixels(x)).detach()
    report = learn.robustness(PGD(1., norm='l2'), n=6, deployed=deployed, progress=False)
    assert [a.name for a in report.attacks]==['PGD-10', 'Square'] and report.attacks[1]==Square(1., norm='l2')
    assert 'agreement' in {o.guard for o in report.findings}
    report = learn.robustness([FGSM(.1), Square(.1, queries=5)], n=40, deployed=deployed, progress=False)
    assert [a.name for a in report.attacks]==['FGSM', 'Square'] and report.attacks[1].queries==5

def test_a_learner_says_where_its_images_come_from():
    learn = _toy_learner()
    learn.dls.loaders = [*learn.dls.loaders, learn.dls.train]
    test = pixels(learn.dls.loaders[2])[1].tolist()
    for k,split in enumerate(('train', 'valid', 'test')):
        report = learn.robustness(FGSM(.1), n=1, dl=learn.dls.loaders[k], progress=False)
        assert report.split==split and report.data=='digits' and report.n==1
    assert learn.robustness(FGSM(.1), progress=False).labels==tuple(test)          # and no loader after it
    assert learn.robustness(FGSM(.1), n=1, split='mine', progress=False).split=='mine'

def test_figures_are_those_of_what_is_deployed():
    learn = _toy_learner()
    x,y = pixels(learn.dls[2])
    space = pixel_space(learn.dls)
    def worse(x): return learn.model(space.from_pixels(x)).detach()*torch.where(x.mean((1, 2, 3))>.3, -1, 1)[:,None]
    report = learn.robustness(FGSM(.01), deployed=worse, progress=False)
    assert report.clean==(worse(x).argmax(1)==y).sum().item()/len(y)
    assert report.clean<.9*learn.robustness(FGSM(.01), progress=False).clean

def test_networks_that_depend_on_the_batch_and_give_log_probabilities():
    "Logits that are all negative are measured by their size, too"
    x = torch.rand(8, 1, 4, 4)
    def net(x): return -5-x.flatten(1)[:,:3]
    check_alone(net, x)
    check_alone(lambda x: net(x)-.3*len(x)/8, x)                      # less than a tenth of the largest
    with pytest.raises(ValueError, match='depends on the others in its batch'):
        check_alone(lambda x: net(x)-2*len(x)/8, x)

def test_networks_beside_a_deployed_one_are_in_eval_mode():
    "And are given back as they were, statistics included"
    fake = nn.Sequential(nn.BatchNorm2d(1), _toy()).train()
    kept = fake[0].running_mean.clone()
    evaluate(lambda x: _toy()(x).detach(), toy_x, toy_y, [first], fake_quantized=fake, progress=False)
    assert torch.equal(kept, fake[0].running_mean) and fake[0].training

def test_what_is_infinite_is_no_number_in_json():
    found = Finding('determinism', False, float('inf'), 1e-4, 'random', 'here', 'masking', 'EOT')
    record = json.loads(replace(_report(), findings=(found,)).to_json(), parse_constant=lambda o: pytest.fail(o))
    assert record['findings'][0]['value'] is None
