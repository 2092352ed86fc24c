"Evaluations whose every figure can be worked out by hand"
import copy, json
import pytest, torch
from torch import nn
from fastai.vision.all import Learner
from adverfine.threat import pixel_space, ThreatModel
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.losses import margin
from adverfine.attacks.scoring import attacked
from adverfine.attacks.gradient import FGSM, PGD
from adverfine.attacks.square import Square
from adverfine.attacks.autoattack import AutoAttack
from adverfine.compression.quantization import quantize
from adverfine.evaluation.report import half_width
from adverfine.evaluation.robustness import evaluate
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
        assert half_width(p, n)==pytest.approx((b*b-4*a*c)**.5/(2*a))

@pytest.mark.parametrize('bs', [256, 3])
def test_report(bs, tmp_path):
    report = evaluate(_toy(), toy_x, toy_y, [first, second], bs=bs, vocab=('left', 'right', 'never'), progress=False)
    assert list(report.outcomes)==toy_outcomes and report.labels==tuple(toy_y.tolist()) and report.n==14
    assert (report.clean, report.robust)==(12/14, 5/14) and report.robust_after=={'PGD-1': 8/14, 'FGSM': 5/14}
    assert report.attacks==(first, second) and report.threat==ThreatModel(.1)
    assert report.clean_ci==half_width(12/14, 14) and report.robust_ci==half_width(5/14, 14)
    assert set(report.took)=={'PGD-1', 'FGSM'} and all(0<o<report.seconds for o in report.took.values())
    assert not report.bf16
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
    assert d['outcomes']==toy_outcomes and d['bf16'] is False
    assert not list(tmp_path.glob('None*')) and isinstance(report.to_json(), str)
    nameless = evaluate(_toy(), toy_x, toy_y, first, progress=False)
    assert list(nameless.per_class().index)==['0', '1', '2'] and nameless.vocab is None

def test_verdicts():
    report = evaluate(_toy(), toy_x, toy_y, [first, second], progress=False)
    assert report.verdict=='trusted' and report.reasons==()
    assert {o.guard for o in report.findings}=={'budget', 'metric', 'determinism', 'probabilities', 'gradients',
        'zero_gradient', 'unbounded', 'scaled_margin', 'black_box'}
    weak = evaluate(_toy(), toy_x, toy_y, first, progress=False)
    assert weak.verdict=='upper bound: possible gradient masking'
    assert any(o.startswith('scaled_margin: ') for o in weak.reasons)
    thorough = evaluate(_toy(), toy_x, toy_y, second, thorough=True, parent=_toy(), progress=False)
    assert {'convergence', 'plateau', 'transfer'}<={o.guard for o in thorough.findings}
    assert evaluate(_toy(), toy_x, toy_y, second, progress=False).findings[0].value<1e-6

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
    labels[:64] = 2                                   # of the first 128 half are wrong
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
    assert report.clean==12/14 and report.robust==12/14

class Compiled(nn.Module):
    "What torch.compile leaves behind"
    def __init__(self, net): super().__init__(); self._orig_mod = net
    def forward(self, x): return self._orig_mod(x)

def test_bfloat16_is_for_modules_that_are_neither_quantized_nor_compiled(monkeypatch):
    import adverfine.evaluation.robustness
    monkeypatch.setattr(adverfine.evaluation.robustness, 'bf16_is_fast', lambda: True)
    net,fake_quantized = _toy(),_toy()
    quantize(fake_quantized, 16, [toy_x])
    said = lambda m, **kw: evaluate(m, toy_x, toy_y, FGSM(.1), progress=False, **kw).bf16
    assert said(net) and not said(net, bf16=False)
    assert not said(fake_quantized) and not said(lambda x: net(x)) and not said(Compiled(net))
    monkeypatch.setattr(adverfine.evaluation.robustness, 'bf16_is_fast', lambda: False)
    assert not said(net) and said(net, bf16=True)

def test_batches_and_passes():
    from adverfine.evaluation.robustness import _Watched
    stands = torch.tensor([True, False, True, True, False, True, True])
    def batches(bs, stands=stands):
        return [o.idxs.tolist() for o in attacked(_toy(), FGSM(.1), toy_x[:7], toy_y[:7], stands, bs=bs)]
    assert batches(2)==[[0, 2], [3, 5], [6]] and batches(5)==[[0, 2, 3, 5, 6]]
    assert [len(o) for o in batches(4)]==[3, 2] and batches(4, stands & ~stands)==[]
    ticks = []
    watched = _Watched(_toy(), ticks.append)
    watched(toy_x); watched(toy_x.clone().requires_grad_())
    assert ticks==[14, 42] and not watched.training
    net = _toy()
    sizes,ask = [],net.forward
    net.train()
    net.forward = lambda x: (sizes.append(len(x)), ask(x))[1]
    evaluate(net, toy_x, toy_y, [first, second], bs=5, progress=False)
    # 12 stand: three batches, crafted and judged
    assert sizes[:3]==[5, 5, 4] and sizes[3:9]==[4]*6 and net.training

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
    assert some.labels==tuple(y[i].tolist()) and some.outcomes==tuple(whole.outcomes[k] for k in i)
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
