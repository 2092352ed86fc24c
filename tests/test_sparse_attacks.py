"Attacks with budgets in l1 and l0: on a trained network, on several channels, in training; random search by hand"
import pytest, torch
from torch import Tensor
from fastai.vision.all import Learner, set_seed
from adverfine.threat import norm_names, ThreatModel
from adverfine.networks.zoo import cnn8
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.attack import Attack
from adverfine.attacks.adaptive import Transfer
from adverfine.attacks.apgd import APGD
from adverfine.attacks.autoattack import AutoAttack
from adverfine.attacks.fab import FAB
from adverfine.attacks.gradient import FGSM, FGSMRS, NFGSM, PGD
from adverfine.attacks.scoring import score
from adverfine.attacks.square import _Draw, _L0Search, _L1Search, _bump, Square
from adverfine.evaluation.report import RobustnessReport
from adverfine.training.adversarial import AdversarialTraining
from adverfine.training.free import FreeAdversarialTraining
from adverfine.training.warmup import EpsilonWarmup
import fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner

def _seed(n=0): return torch.Generator().manual_seed(n)
def _rand(*shape, seed=0, dtype=torch.float64): return torch.rand(*shape, generator=_seed(seed), dtype=dtype)

@pytest.fixture(scope='module')
def learn():
    set_seed(0)
    learn = Learner(digits_dls(), cnn8(size=8))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(12, 5e-3)
    return learn

@pytest.fixture(scope='module')
def right(learn):
    "Plain images that the network is right about, and their labels"
    x,y = (o[:200] for o in pixels(learn.dls.valid))
    x = x.as_subclass(Tensor)
    with torch.no_grad(): ok = learn.model.eval()(x).argmax(1)==y
    return x[ok],y[ok]

class Noise(Attack):
    def craft(self, model, x, y, generator): return self.threat.random_start(x, generator)

strong = dict(linf=.15, l2=1., l1=3., l0=4)

@pytest.mark.parametrize('norm', strong)
def test_attacks_take_accuracy_within_their_budget(learn, right, norm):
    eps,(x,y) = strong[norm],right
    noise = score(learn.model, Noise(eps, norm=norm), x, y).robust
    assert noise>.7
    for attack,least in [(FGSM(eps, norm=norm), .1), (FGSMRS(eps, norm=norm), .1), (PGD(eps, norm=norm), .3),
                         (Square(eps, norm=norm, queries=150), .3)]:
        x_adv = attack(learn.model, x, y, _seed())
        attack.threat.check(x_adv, x)
        assert torch.equal(x_adv, attack(learn.model, x, y, _seed()))    # the generator decides
        robust = (learn.model(x_adv).argmax(1)==y).float().mean()
        assert robust<noise-least, attack

@pytest.mark.parametrize('norm', ['l1', 'l0'])
def test_steps_and_restarts_help(learn, right, norm):
    def stands(**kw): return score(learn.model, PGD(strong[norm], norm=norm, **kw), *right).stands.sum()
    one,ten,four = stands(steps=1, random_start=False),stands(steps=10),stands(steps=10, restarts=4)
    assert one>ten>=four

def test_three_channels_are_one_pixel():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8*16, 5))
    x = _rand(16, 3, 6, 6, dtype=torch.float32)
    with torch.no_grad(): y = net(x).argmax(1)
    for eps in (0, 1, 5, 36, 50):
        for attack in (FGSM(eps, norm='l0'), PGD(eps, norm='l0'), Square(eps, norm='l0', queries=30)):
            x_adv = attack(net, x, y, _seed())
            assert ((x_adv!=x).any(1).sum((1,2))<=eps).all() and x_adv.min()>=0 and x_adv.max()<=1
    assert ((PGD(5, norm='l0')(net, x, y, _seed())!=x).any(1).sum((1,2))==5).sum()>8

def test_n_fgsm_in_l1_leaves_the_ball(right):
    x,y = right
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    attack = NFGSM(4., norm='l1', clamp=False)
    far = attack.threat.distance(attack(net, x, y, _seed()), x)
    assert far.max()>5 and far.max()<=12.01

def test_norms_that_an_attack_does_not_know_are_refused():
    for kind in (APGD, FAB, AutoAttack):
        for norm in ('l1', 'l0'):
            with pytest.raises(ValueError, match=f"{kind.__name__} works in 'linf' and 'l2', not with norm='{norm}': "
                                                 "use PGD or Square"): kind(5, norm=norm)
        assert kind(.5, norm='l2').norm=='l2'
    with pytest.raises(ValueError, match="norm='l7' is not offered"): APGD(5, norm='l7')
    assert Transfer(PGD(5, norm='l0'), None).threat==ThreatModel(5, 'l0')

@pytest.mark.parametrize('norm', ['l1', 'l0'])
def test_figures(learn, right, norm):
    fig = PGD(strong[norm], norm=norm).show(learn.model, *right, max_n=3)
    change = fig.axes[3].images[0].get_array()
    assert abs(change-.5).max()>.05

# --- random search

def test_l1_bumps_and_moves():
    for side in (1, 2, 3, 5, 8): assert abs(_bump(side, _Draw(_seed(), 'cpu'), 1).abs().sum()-1)<1e-5
    steep = _bump(9, _Draw(_seed(), 'cpu'), 1).abs()
    assert steep.max()/steep.sum()>2*_bump(9, _Draw(_seed(), 'cpu'), 2).abs().max()/_bump(9, _Draw(_seed(), 'cpu'),
                                                                                            2).abs().sum()
    x = _rand(4, 2, 11, 12)
    for eps in (.5, 5., 40.):
        search = _L1Search(Square(eps, norm='l1'), _Draw(_seed(), 'cpu'))
        adv = search.first(x)
        for share in (.8, .1, .01):
            torch.testing.assert_close((adv-x).abs().sum((1,2,3)), torch.full((4,), eps, dtype=x.dtype))
            assert adv.min()>=0 and adv.max()<=1
            new = search.change(x, adv, share)
            assert (new!=adv).flatten(1).any(1).all()
            adv = new

@pytest.mark.parametrize('eps,share,moved', [(6, .5, 3), (6, .01, 1), (1, .9, 1), (20, .5, 4), (24, .25, 6)])
def test_pixels_change_places(eps, share, moved):
    "24 pixels: `moved` are set back, as many others are changed, and the rest stays as it was"
    x = _rand(5, 3, 4, 6)*.8+.1                                          # no corner is a clean value
    search = _L0Search(Square(eps, norm='l0'), _Draw(_seed(), 'cpu'))
    adv = search.first(x)
    for _ in range(20):
        assert (adv[(adv!=x)]%1==0).all()
        new = search.change(x, adv, share)
        was,now = ((o!=x).any(1).flatten(1) for o in (adv, new))
        off = int(share*eps) or 1
        if eps<24:
            assert ((was & ~now).sum(1)==off).all() and ((now & ~was).sum(1)==min(off, 24-eps)).all()
        same = was & now
        kept = (new==adv).all(1).flatten(1)
        assert kept[same].all() if eps<24 else ((~kept).sum(1)<=moved).all()
        adv = new if off<=24-eps else adv
    black = search.first(torch.zeros(2, 1, 4, 6))                        # half of the draws change nothing
    assert ((black!=0).sum((1,2,3))<=eps).all()

def test_schedule_of_exchanges():
    square = Square(10, norm='l0')
    assert [square._share(k) for k in (0, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)]==pytest.approx(
        [.3/o for o in (2, 2, 4, 5, 6, 8, 10, 12, 15, 20)])
    assert Square(10, norm='l0', p=.8)._share(0)==.4 and Square(10, norm='l1')._share(11)==.4

# --- reports and training

@pytest.mark.parametrize('norm', strong)
def test_a_report_names_the_norm(norm):
    threat = ThreatModel(strong[norm], norm)
    report = RobustnessReport(.9, .5, 10, threat, (), {}, {}, {}, 1.)
    assert report.plot().subfigs[0].axes[0].get_xlabel()==f'eps ({norm_names[norm]}, pixels)'
    assert str(threat) in str(report)

@pytest.mark.parametrize('callbacks', [
    lambda: [AdversarialTraining(PGD(4, norm='l0', steps=2)), EpsilonWarmup(.5)],
    lambda: [AdversarialTraining(NFGSM(3., norm='l1'))],
    lambda: [FreeAdversarialTraining(4, 2, norm='l0')]], ids=['warm-up', 'n-fgsm', 'free'])
def test_training(callbacks):
    set_seed(0)
    learn = Learner(digits_dls(n_train=284), cnn8(size=8))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3, cbs=callbacks())
    assert all(p.isfinite().all() for p in learn.model.parameters())
