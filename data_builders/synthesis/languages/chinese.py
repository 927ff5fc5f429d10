"""Chinese, simplified."""

from data_builders.synthesis.wording import Wording, uninflected

WORDING = Wording(
    answer="答案：",
    names=("小明", "小红", "小丽", "小刚"),
    products=uninflected("杯子", "书包", "闹钟", "枕头", "盘子", "钱包"),  # all counted with 个
    goods=("大米", "白糖", "面粉", "咖啡豆"),
    questions={
        "unit_price": (
            "{weight}公斤{good}卖{price}。照这个价格，{wanted}公斤要多少钱？",
            "{name}花{price}买了{weight}公斤{good}。按同样的单价，买{wanted}公斤要花多少钱？",
        ),
        "discount": (
            "{item}每个{price}。{name}买{count}个，商店优惠{percent}%。{name}要付多少钱？",
            "商店所有{item}降价{percent}%，原价每个{price}。现在买{count}个要多少钱？",
        ),
        "voucher": (
            "{name}买{count}个{item}，每个{price}。优惠券满{minimum}减{off}。{name}要付多少钱？",
            "{item}每个{price}，有一张满{minimum}减{off}的优惠券。买{count}个要付多少钱？",
        ),
        "bundle": (
            "一个{item}要{first}，一个{other}要{second}，两样一套卖{pack}。买{count}套能省多少钱？",
            "单买{item}要{first}，单买{other}要{second}，套装每套{pack}。{name}买{count}套，能省多少钱？",
        ),
        "shipping": (
            "{name}网购{count}个{item}，每个{price}。运费{fee}，满{free_from}免运费。一共要付多少钱？",
            "某网店运费{fee}，订单满{free_from}包邮。买{count}个{item}，每个{price}，连运费一共多少钱？",
        ),
        "change": (
            "{name}买了{count}个{item}，每个{price}，又买了一个{other}，价格{extra}，付了{paid}。应找回多少钱？",
            "{item}每个{price}，{other}每个{extra}。{name}买{count}个{item}和一个{other}，付{paid}，找回多少钱？",
        ),
        "stock": (
            "商店有{start}个{item}。{orders}位顾客每人买走{each}个，后来又进货{delivered}个。现在有多少个{item}？",
            "仓库里有{start}个{item}。发出{orders}个订单，每单{each}个，又到货{delivered}个。现在库存多少个？",
        ),
        "comparison": (
            "第一家店{small}个{item}卖{small_price}，第二家店{large}个卖{large_price}。在便宜的那家买，每个便宜多少钱？",
            "{item}{small}个装卖{small_price}，{large}个装卖{large_price}。选更划算的那种，每个能省多少钱？",
        ),
    },
    checks=("检查一下：{check}，正确。", "倒过来验算：{check}，没错。"),
    stop="。",
    space="",
)
