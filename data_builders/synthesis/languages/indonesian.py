"""Indonesian."""

from data_builders.synthesis.wording import Wording, uninflected

WORDING = Wording(
    answer="Jawaban: ",
    names=("Budi", "Siti", "Dewi", "Andi"),
    products=uninflected("tas", "gelas", "piring", "bantal", "topi", "lampu"),
    goods=("beras", "gula", "tepung", "kopi"),
    questions={
        "unit_price": (
            "Harga {weight} kg {good} adalah {price}. Berapa harga {wanted} kg {good}?",
            "{name} membeli {weight} kg {good} seharga {price}. Dengan harga per kg yang sama, "
            "berapa harga {wanted} kg?",
        ),
        "discount": (
            "Harga satu {item} {price}. {name} membeli {count} {item} dan mendapat diskon {percent}%. "
            "Berapa yang harus dibayar {name}?",
            "Toko memberi diskon {percent}% untuk semua {item}. Harga normalnya {price} per buah. "
            "Berapa harga {count} {item} sekarang?",
        ),
        "voucher": (
            "{name} membeli {count} {item} seharga {price} per buah. Voucher memberi potongan {off} "
            "untuk belanja minimal {minimum}. Berapa yang harus dibayar {name}?",
            "Harga satu {item} {price}. Ada voucher potongan {off} dengan belanja minimal {minimum}. "
            "Berapa yang harus dibayar untuk {count} {item}?",
        ),
        "bundle": (
            "Harga satu {item} {first} dan satu {other} {second}. Satu paket berisi keduanya dijual {pack}. "
            "Berapa yang dihemat jika membeli {count} paket?",
            "Jika dibeli terpisah, harga {item} {first} dan harga {other} {second}; harga satu paket {pack}. "
            "{name} membeli {count} paket. Berapa yang dihemat {name}?",
        ),
        "shipping": (
            "{name} memesan {count} {item} seharga {price} per buah. Ongkos kirim {fee}, tetapi gratis untuk "
            "pesanan minimal {free_from}. Berapa total yang harus dibayar?",
            "Sebuah toko mengenakan ongkos kirim {fee}; pesanan mulai {free_from} gratis ongkir. "
            "Berapa total harga {count} {item} seharga {price} per buah, termasuk ongkos kirim?",
        ),
        "change": (
            "{name} membeli {count} {item} seharga {price} per buah dan satu {other} seharga {extra}, "
            "lalu membayar {paid}. Berapa kembaliannya?",
            "Harga satu {item} {price} dan satu {other} {extra}. {name} membeli {count} {item} dan satu {other}, "
            "lalu menyerahkan {paid}. Berapa uang kembaliannya?",
        ),
        "stock": (
            "Sebuah toko punya {start} {item}. Sebanyak {orders} pembeli masing-masing membeli {each}, "
            "lalu datang lagi {delivered}. Berapa {item} yang ada sekarang?",
            "Di gudang ada {start} {item}. Keluar {orders} pesanan yang masing-masing berisi {each} {item}, "
            "lalu masuk {delivered} {item}. Berapa stok sekarang?",
        ),
        "comparison": (
            "Toko pertama menjual {small} {item} seharga {small_price}, toko kedua menjual {large} {item} "
            "seharga {large_price}. Berapa lebih murah harga satu {item} di toko yang lebih murah?",
            "Satu pak isi {small} {item} dijual {small_price}, satu pak isi {large} dijual {large_price}. "
            "Berapa yang dihemat per {item} dengan memilih pak yang lebih murah?",
        ),
    },
    checks=("Periksa lagi: {check}. Benar.", "Hitung balik: {check}. Cocok."),
)
