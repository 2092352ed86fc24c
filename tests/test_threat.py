"What the adversary may do, on images that one can count on one's fingers"
import pytest, torch
from torch import nn, Tensor
from fastai.data.transforms import Normalize
from fastai.distributed import DistributedDL
from fastai.vision.core import TensorImage
from adverfine.threat import check_images, pixel_space, PixelModel, PixelSpace, ThreatModel
from adverfine.data.sources import digits_dls

def _images(*rows): return torch.tensor(rows, dtype=torch.float64).view(len(rows), 1, 2, 2)
def _seed(n=0): return torch.Generator().manual_seed(n)

def test_eps_is_in_pixels_and_the_norm_is_known():
    for eps in (0, 1, 8/255): assert ThreatModel(eps).eps==eps
    for eps in (-.01, 1.01, 8, float('nan')):
        with pytest.raises(ValueError, match='8/255, not 8'): ThreatModel(eps)
    with pytest.raises(ValueError, match="'linf', 'l2', 'l1', 'l0'"): ThreatModel(.1, 'l3')
    assert ThreatModel(.1)==ThreatModel(.1, 'linf', True)

def test_distance():
    x = _images([.5, .5, .5, .5], [.5, .5, .5, .5])
    x_adv = x + _images([.3, -.4, 0, 0], [0, 0, .1, .2])
    torch.testing.assert_close(ThreatModel(.1).distance(x_adv, x), torch.tensor([.4, .2]).double())
    torch.testing.assert_close(ThreatModel(.1, 'l2').distance(x_adv, x), torch.tensor([.25, .05]).double().sqrt())

def test_projection_onto_the_box():
    x = _images([.5, .02, .97, .5])
    far = _images([.9, -.5, 2., .45])
    torch.testing.assert_close(ThreatModel(.1).project(far, x), _images([.6, 0, 1, .45]))
    torch.testing.assert_close(ThreatModel(.1, clamp=False).project(far, x), _images([.6, -.08, 1.07, .45]))
    torch.testing.assert_close(ThreatModel(.1).projection(x)(far), _images([.6, 0, 1, .45]))
    assert x.tolist()==_images([.5, .02, .97, .5]).tolist()

def test_projection_onto_the_ball():
    x = _images([.5, .5, .5, .5], [.5, .5, .5, .5], [.5, .5, .5, .5], [.98, .5, .5, .5])
    far = x + _images([.3, 0, -.4, 0], [.03, 0, -.04, 0], [0, 0, 0, 0], [.4, .3, 0, 0])
    moved = _images([.06, 0, -.08, 0], [.03, 0, -.04, 0], [0, 0, 0, 0], [.08, .06, 0, 0])
    torch.testing.assert_close(ThreatModel(.1, 'l2', clamp=False).project(far, x), x+moved)
    torch.testing.assert_close(ThreatModel(.1, 'l2').project(far, x), (x+moved).clamp(max=1))
    torch.testing.assert_close(ThreatModel(.1, 'l2').project(x-far+.02, x*0),
        (ThreatModel(.1, 'l2', clamp=False).project(x-far+.02, x*0)).clamp(min=0))

@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_check(norm):
    x,threat = _images([.5, .5, .5, .5], [.5, .5, .5, .5]),ThreatModel(.1, norm)
    off = lambda d: x + _images([0, 0, 0, 0], [0, 0, d, 0])
    threat.check(off(.1+5e-7), x)
    for bad in (off(.1+2e-6), off(-.1-2e-6), off(float('nan'))):
        with pytest.raises(ValueError, match='Liar left its budget'): threat.check(bad, x, 'Liar')
    with pytest.raises(ValueError, match='made images of shape'): threat.check(x[:1], x)
    outside = x*0+.97, x*0+.97 + _images([0, 0, 0, 0], [0, 0, .08, 0])
    with pytest.raises(ValueError, match='reach from 0.97 to 1.05'): threat.check(outside[1], outside[0])
    ThreatModel(.1, norm, clamp=False).check(outside[1], outside[0])

def test_check_images():
    good = torch.tensor([0., 1., .5, .5]).view(1, 1, 2, 2)
    check_images(good); check_images(good.double()); check_images(good.half())
    for bad,why in [(good[0], 'a float tensor'), (good[None], 'a float tensor'), (good.long(), 'a float tensor'),
            (good[:0], 'no images'),
                    (good+1e-4, 'reach from 0.0001 to 1'), (good-1e-4, 'reach from -0.0001 to 0.9999'),
                    (good*float('nan'), 'NaN'), (good/0, 'NaN'),
                    (torch.where(good==.5, float('nan'), good), 'NaN'), (torch.where(good==1, float('inf'), good),
                    'NaN')]:
        with pytest.raises(ValueError, match=why): check_images(bad)

def test_steepest_has_length_one_and_zero_stays_zero():
    grad = _images([3, 0, -4, 0], [0, 0, 0, 0], [1e-9, 0, 0, 0])
    torch.testing.assert_close(ThreatModel(.1).steepest(grad), grad.sign())
    torch.testing.assert_close(ThreatModel(.1, 'l2').steepest(grad), _images([.6, 0, -.8, 0], [0, 0, 0, 0],
        [1, 0, 0, 0]))

def test_random_starts_fill_the_box():
    x = torch.full((500, 2, 2, 2), .5, dtype=torch.float64)
    d = ThreatModel(.1).random_start(x, _seed())-x
    assert d.dtype==torch.float64 and d.abs().max()<=.1 and d.max()>.099 and d.min()<-.099
    assert abs((d<-.05).double().mean()-.25)<.03 and abs((d>.05).double().mean()-.25)<.03
    assert ThreatModel(.1).random_start(x*0, _seed()).min()==0

def test_random_starts_fill_the_ball():
    x = torch.full((4000, 2, 2, 2), .5, dtype=torch.float64)
    start = ThreatModel(.1, 'l2').random_start(x, _seed())
    length = ThreatModel(.1, 'l2').distance(start, x)
    assert start.dtype==torch.float64 and length.max()<=.1+1e-9
    for share in (.1, .5, .9): assert abs((length<share*.1).double().mean()-share)<.02      # the radius is uniform
    assert ((start-x).flatten(1).mean(0).abs()<.002).all()
    assert torch.equal(start, ThreatModel(.1, 'l2').random_start(x, _seed()))
    assert not torch.equal(start, ThreatModel(.1, 'l2').random_start(x, _seed(1)))

def _norm(mean, std): return Normalize(torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1))

def test_two_normalisations_are_undone_in_the_opposite_order():
    space = PixelSpace([_norm([.5], [.25]), _norm([1.], [2.])])
    pixel = torch.tensor([0., .25, .5, 1.]).view(1, 1, 2, 2)
    batch = ((pixel-.5)/.25-1)/2
    torch.testing.assert_close(space.from_pixels(pixel), batch)
    torch.testing.assert_close(space.to_pixels(batch), pixel)

def test_pixels_of_three_channels_and_of_plain_numbers():
    pixel = torch.rand(2, 3, 2, 2, generator=_seed())
    space = PixelSpace([_norm([.1, .2, .3], [.5, .6, .7])])
    torch.testing.assert_close(space.to_pixels(TensorImage(space.from_pixels(pixel))), pixel)
    assert type(space.to_pixels(TensorImage(space.from_pixels(pixel)))) is Tensor
    plain = PixelSpace([type('N', (), dict(mean=.5, std=.25))])
    torch.testing.assert_close(plain.from_pixels(pixel), (pixel-.5)*4)
    torch.testing.assert_close(plain.to_pixels((pixel-.5)*4), pixel)

def test_rounding_is_forgiven_and_nothing_else():
    space = PixelSpace()
    for off in (5e-4, -5e-4):
        x = torch.full((1, 1, 2, 2), float(off>0))+off
        assert space.to_pixels(x).flatten().tolist()==[float(off>0)]*4
    assert space.to_pixels(torch.zeros(0, 1, 2, 2)).shape==(0, 1, 2, 2)
    for bad in (torch.full((1, 1, 2, 2), 1.002), torch.full((1, 1, 2, 2), -.002),
            torch.tensor([0., 1, .5, float('nan')]).view(1, 1, 2, 2)):
        with pytest.raises(ValueError, match='images'): space.to_pixels(bad)

def test_a_wrapped_network_takes_pixels():
    net,space,x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)),PixelSpace([_norm([.5], [.25])]),torch.rand(2, 1, 2, 2,
        generator=_seed())
    assert PixelSpace().wrap(net) is net
    wrapped = space.wrap(net)
    assert isinstance(wrapped, PixelModel)
    torch.testing.assert_close(wrapped(x), net((x-.5)/.25))

def test_the_space_of_a_loader_and_of_one_around_it():
    dls = digits_dls(n_train=142, normalize=(.5,.25))
    for dl in (dls.train, dls, DistributedDL(dls.train, rank=0, world_size=2)):
        [norm] = pixel_space(dl).normalizations
        assert isinstance(norm, Normalize) and norm.mean.item()==.5 and norm.std.item()==.25
    assert pixel_space(digits_dls(n_train=142)).normalizations==[]
