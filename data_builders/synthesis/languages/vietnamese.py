"""Vietnamese."""

from data_builders.synthesis.wording import Wording, uninflected

WORDING = Wording(
    answer="Đáp án: ",
    names=("Lan", "Minh", "Hoa", "Nam"),
    products=uninflected("cốc", "đĩa", "túi", "gối", "mũ", "áo"),  # all counted with cái
    goods=("gạo", "đường", "bột mì", "cà phê"),
    questions={
        "unit_price": (
            "{weight} kg {good} giá {price}. Mua {wanted} kg {good} hết bao nhiêu tiền?",
            "{name} mua {weight} kg {good} hết {price}. Với cùng giá mỗi kg, mua {wanted} kg hết bao nhiêu tiền?",
        ),
        "discount": (
            "Mỗi cái {item} giá {price}. {name} mua {count} cái và được giảm {percent}%. "
            "{name} phải trả bao nhiêu tiền?",
            "Cửa hàng giảm giá {percent}% cho tất cả {item}. Giá gốc là {price} một cái. "
            "Bây giờ mua {count} cái hết bao nhiêu tiền?",
        ),
        "voucher": (
            "{name} mua {count} cái {item}, mỗi cái {price}. Phiếu giảm giá trừ {off} cho đơn hàng từ {minimum} "
            "trở lên. {name} phải trả bao nhiêu tiền?",
            "Một cái {item} giá {price}. Có phiếu giảm {off} nếu mua ít nhất {minimum}. "
            "Mua {count} cái phải trả bao nhiêu tiền?",
        ),
        "bundle": (
            "Một cái {item} giá {first}, một cái {other} giá {second}. Mua cả hai theo bộ thì mỗi bộ giá {pack}. "
            "Mua {count} bộ tiết kiệm được bao nhiêu tiền?",
            "Mua lẻ thì {item} giá {first} và {other} giá {second}; một bộ gồm cả hai giá {pack}. "
            "{name} mua {count} bộ thì tiết kiệm được bao nhiêu tiền?",
        ),
        "shipping": (
            "{name} đặt {count} cái {item}, mỗi cái {price}. Phí giao hàng là {fee}, miễn phí cho đơn hàng từ "
            "{free_from} trở lên. Tổng cộng phải trả bao nhiêu tiền?",
            "Cửa hàng tính phí giao hàng {fee}; đơn hàng ít nhất {free_from} được giao miễn phí. "
            "Mua {count} cái {item} giá {price} một cái, tính cả phí giao hàng, hết bao nhiêu tiền?",
        ),
        "change": (
            "{name} mua {count} cái {item}, mỗi cái {price}, và một cái {other} giá {extra}, rồi đưa {paid}. "
            "{name} được trả lại bao nhiêu tiền?",
            "Một cái {item} giá {price}, một cái {other} giá {extra}. {name} mua {count} cái {item} và một cái "
            "{other}, rồi trả {paid}. Tiền thừa là bao nhiêu?",
        ),
        "stock": (
            "Cửa hàng có {start} cái {item}. Có {orders} khách mua, mỗi người {each} cái, sau đó nhập thêm "
            "{delivered} cái. Bây giờ có bao nhiêu cái {item}?",
            "Trong kho có {start} cái {item}. Kho xuất {orders} đơn hàng, mỗi đơn {each} cái, rồi nhập thêm "
            "{delivered} cái. Bây giờ trong kho có bao nhiêu cái?",
        ),
        "comparison": (
            "Cửa hàng thứ nhất bán {small} cái {item} giá {small_price}, cửa hàng thứ hai bán {large} cái giá "
            "{large_price}. Ở cửa hàng rẻ hơn, mỗi cái rẻ hơn bao nhiêu tiền?",
            "Gói {small} cái {item} giá {small_price}, gói {large} cái giá {large_price}. "
            "Chọn gói rẻ hơn thì mỗi cái tiết kiệm được bao nhiêu tiền?",
        ),
    },
    checks=("Kiểm tra lại: {check}. Đúng.", "Tính ngược lại: {check}. Khớp."),
)
