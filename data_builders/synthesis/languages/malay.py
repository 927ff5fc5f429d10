"""Malay, of Malaysia."""

from data_builders.synthesis.wording import Wording, uninflected

WORDING = Wording(
    answer="Jawapan: ",
    names=("Aminah", "Farid", "Nurul", "Hakim"),
    products=uninflected("beg", "bakul", "lampu", "kerusi", "jam", "kipas"),  # all counted with buah
    goods=("beras", "gula", "tepung", "kopi"),
    questions={
        "unit_price": (
            "Harga {weight} kg {good} ialah {price}. Berapakah harga {wanted} kg {good}?",
            "{name} membeli {weight} kg {good} dengan harga {price}. Pada harga sekilogram yang sama, "
            "berapakah harga {wanted} kg?",
        ),
        "discount": (
            "Harga sebuah {item} ialah {price}. {name} membeli {count} buah dan mendapat diskaun {percent}%. "
            "Berapakah yang perlu dibayar oleh {name}?",
            "Kedai memberi diskaun {percent}% untuk semua {item}. Harga asal ialah {price} sebuah. "
            "Berapakah harga {count} buah {item} sekarang?",
        ),
        "voucher": (
            "{name} membeli {count} buah {item} pada harga {price} sebuah. Baucar memberi potongan {off} "
            "untuk pembelian minimum {minimum}. Berapakah yang perlu dibayar oleh {name}?",
            "Harga sebuah {item} ialah {price}. Ada baucar potongan {off} jika berbelanja {minimum} atau lebih. "
            "Berapakah yang perlu dibayar untuk {count} buah {item}?",
        ),
        "bundle": (
            "Harga sebuah {item} ialah {first} dan sebuah {other} ialah {second}. Satu set kedua-duanya dijual "
            "{pack}. Berapakah yang dijimatkan jika membeli {count} set?",
            "Jika dibeli berasingan, {item} berharga {first} dan {other} berharga {second}; satu set berharga {pack}. "
            "{name} membeli {count} set. Berapakah yang dijimatkan oleh {name}?",
        ),
        "shipping": (
            "{name} memesan {count} buah {item} pada harga {price} sebuah. Kos penghantaran ialah {fee}, tetapi "
            "percuma untuk pesanan {free_from} atau lebih. Berapakah jumlah bayaran?",
            "Sebuah kedai mengenakan kos penghantaran {fee}; pesanan sekurang-kurangnya {free_from} dihantar percuma. "
            "Berapakah jumlah harga {count} buah {item} pada harga {price} sebuah, termasuk penghantaran?",
        ),
        "change": (
            "{name} membeli {count} buah {item} pada harga {price} sebuah dan sebuah {other} pada harga {extra}, "
            "lalu membayar {paid}. Berapakah wang bakinya?",
            "Harga sebuah {item} ialah {price} dan sebuah {other} ialah {extra}. {name} membeli {count} buah {item} "
            "dan sebuah {other}, lalu menyerahkan {paid}. Berapakah wang bakinya?",
        ),
        "stock": (
            "Sebuah kedai mempunyai {start} buah {item}. Seramai {orders} pelanggan membeli {each} buah setiap orang, "
            "kemudian {delivered} buah lagi tiba. Berapakah bilangan {item} sekarang?",
            "Ada {start} buah {item} di dalam stor. Sebanyak {orders} pesanan keluar, setiap pesanan {each} buah, "
            "kemudian {delivered} buah masuk. Berapakah stok sekarang?",
        ),
        "comparison": (
            "Kedai pertama menjual {small} buah {item} pada harga {small_price}, kedai kedua menjual {large} buah "
            "pada harga {large_price}. Berapakah lebih murah harga sebuah {item} di kedai yang lebih murah?",
            "Satu pek {small} buah {item} berharga {small_price} dan satu pek {large} buah berharga {large_price}. "
            "Berapakah yang dijimatkan bagi sebuah {item} dengan tawaran yang lebih murah?",
        ),
    },
    checks=("Semak semula: {check}. Betul.", "Kira secara songsang: {check}. Tepat."),
)
