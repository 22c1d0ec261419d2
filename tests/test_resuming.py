"""Where a training goes on."""

from nanoquant.resuming import Order


def test_an_order_begins_anywhere_and_holds_every_window_once_an_epoch():
    order = Order(windows=7, batch=2, epochs=3, seed=5)
    whole = list(order)
    assert len(whole) == len(order) == order.steps == 12
    for epoch in range(3):
        batches = whole[4 * epoch : 4 * epoch + 4]
        assert sorted(n for batch in batches for n in batch) == list(range(7))
    assert whole[:4] != whole[4:8]
    order.start = 5
    assert list(order) == whole[5:] and len(order) == 7
