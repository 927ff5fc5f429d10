"""Thai."""

from data_builders.synthesis.wording import Wording, uninflected

WORDING = Wording(
    answer="คำตอบ: ",
    names=("มานี", "สมชาย", "ปิติ", "ชูใจ"),
    products=uninflected("แก้ว", "จาน", "กระเป๋า", "หมอน", "หมวก", "ตะกร้า"),  # all counted with ใบ
    goods=("ข้าวสาร", "น้ำตาล", "แป้ง", "กาแฟ"),
    questions={
        "unit_price": (
            "{good} {weight} กิโลกรัม ราคา {price} ถ้าซื้อ {wanted} กิโลกรัม ต้องจ่ายเท่าไร",
            "{name}ซื้อ{good} {weight} กิโลกรัม จ่าย {price} ถ้าราคาต่อกิโลกรัมเท่าเดิม {wanted} กิโลกรัมราคาเท่าไร",
        ),
        "discount": (
            "{item}ราคาใบละ {price} {name}ซื้อ {count} ใบ ได้ส่วนลด {percent}% {name}ต้องจ่ายเท่าไร",
            "ร้านลดราคา{item}ทุกใบ {percent}% ราคาปกติใบละ {price} ซื้อ {count} ใบต้องจ่ายเท่าไร",
        ),
        "voucher": (
            "{name}ซื้อ{item} {count} ใบ ราคาใบละ {price} มีคูปองลด {off} เมื่อซื้อครบ {minimum} {name}ต้องจ่ายเท่าไร",
            "{item}ราคาใบละ {price} คูปองลด {off} ใช้ได้เมื่อซื้อตั้งแต่ {minimum} ขึ้นไป ซื้อ {count} ใบต้องจ่ายเท่าไร",
        ),
        "bundle": (
            "{item}ราคาใบละ {first} และ{other}ราคาใบละ {second} ซื้อคู่กันเป็นชุดราคาชุดละ {pack} ซื้อ {count} ชุดประหยัดได้เท่าไร",
            "ถ้าซื้อแยก {item}ราคา {first} และ{other}ราคา {second} ถ้าซื้อเป็นชุดราคาชุดละ {pack} "
            "{name}ซื้อ {count} ชุด ประหยัดได้เท่าไร",
        ),
        "shipping": (
            "{name}สั่งซื้อ{item} {count} ใบ ราคาใบละ {price} ค่าส่ง {fee} แต่ส่งฟรีเมื่อซื้อครบ {free_from} ต้องจ่ายทั้งหมดเท่าไร",
            "ร้านคิดค่าส่ง {fee} และส่งฟรีเมื่อซื้อตั้งแต่ {free_from} ขึ้นไป ซื้อ{item} {count} ใบ ราคาใบละ {price} "
            "รวมค่าส่งแล้วต้องจ่ายเท่าไร",
        ),
        "change": (
            "{name}ซื้อ{item} {count} ใบ ราคาใบละ {price} และ{other} 1 ใบ ราคา {extra} จ่ายเงิน {paid} ได้เงินทอนเท่าไร",
            "{item}ราคาใบละ {price} {other}ราคาใบละ {extra} {name}ซื้อ{item} {count} ใบ และ{other} 1 ใบ "
            "แล้วจ่ายเงิน {paid} ได้เงินทอนเท่าไร",
        ),
        "stock": (
            "ร้านมี{item} {start} ใบ ลูกค้า {orders} คนซื้อคนละ {each} ใบ แล้วมีของเข้ามาเพิ่ม {delivered} ใบ ตอนนี้มี{item}กี่ใบ",
            "ในคลังมี{item} {start} ใบ ส่งออก {orders} คำสั่งซื้อ คำสั่งซื้อละ {each} ใบ แล้วรับเข้า {delivered} ใบ ตอนนี้ในคลังมีกี่ใบ",
        ),
        "comparison": (
            "ร้านแรกขาย{item} {small} ใบ ราคา {small_price} ร้านที่สองขาย {large} ใบ ราคา {large_price} "
            "ร้านที่ถูกกว่าขายถูกกว่าใบละเท่าไร",
            "{item}แพ็ก {small} ใบ ราคา {small_price} แพ็ก {large} ใบ ราคา {large_price} "
            "ถ้าเลือกแพ็กที่คุ้มกว่าจะประหยัดได้ใบละเท่าไร",
        ),
    },
    checks=("ตรวจสอบ: {check} ถูกต้อง", "คิดย้อนกลับ: {check} ตรงกัน"),
    stop="",
)
